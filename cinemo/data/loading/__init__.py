"""A finished dataset as training batches, in the canonical order."""
