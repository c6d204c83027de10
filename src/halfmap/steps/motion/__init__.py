"""Motion correction: movies to micrographs."""
