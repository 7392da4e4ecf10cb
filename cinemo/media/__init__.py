"""Video files, frames, motion scores: everything about pixels that needs no network."""
