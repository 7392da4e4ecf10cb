"""Noise schedules, DDIM, guidance and DCTInit: mathematics on plain tensors, with torch alone."""
