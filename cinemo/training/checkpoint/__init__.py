"""Sharded checkpoints, and what is exported from them."""
