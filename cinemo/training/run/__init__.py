"""A training run: the Ray Train job, its ranks, the loop, and DeepSpeed."""
