"""The overview pictures of a simulation."""

from __future__ import annotations


def draw_movies(*a):
    pass


def draw_particles(*a):
    pass


def draw_micrographs(*a):
    pass
