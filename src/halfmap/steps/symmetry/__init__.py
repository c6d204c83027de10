"""Symmetry: which point group a map has, and the map in its standard setting."""
