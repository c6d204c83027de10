"""Picking: from micrographs to the coordinates of their particles."""
