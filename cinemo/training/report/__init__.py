"""What a training says of itself: metrics, validation, sample sheets, progress, the log of samples."""
