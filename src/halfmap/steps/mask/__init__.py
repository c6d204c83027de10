"""Soft masks: around the particle of a map, of simple shape, around an atomic model."""
