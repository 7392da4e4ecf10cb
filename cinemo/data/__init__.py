"""From a manifest of clips to a dataset of latents, and from that dataset to training batches."""
