"""Images and labels: sources, decoding, splits, augmentation, checks."""
