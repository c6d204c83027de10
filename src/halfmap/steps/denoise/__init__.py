"""Noise taken from micrographs by a network that was trained on their own even and odd sums."""
