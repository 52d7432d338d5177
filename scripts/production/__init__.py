"""What `scripts/prove production` is made of."""
