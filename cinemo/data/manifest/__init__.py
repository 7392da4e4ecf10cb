"""What a dataset is made from: a list of clips, read, checked and never held in memory whole."""
