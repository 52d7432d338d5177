"""What has to be shown on an NVIDIA GPU, in slices of less than ten minutes: scripts/gpu_check."""
