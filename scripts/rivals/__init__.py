"""Other ways to render with less work, each by its own code: what `scripts/prove rivals` runs."""
