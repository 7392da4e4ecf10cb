"""Training: the loop, DeepSpeed, the Ray Train entry, checkpoints and their export."""
