"""The files that pictures, videos and latents are kept in, and what these say of their making."""
