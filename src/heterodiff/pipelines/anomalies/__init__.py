"""Anomalies: maps of images, masks and decisions, and what is learned for them from image labels."""
