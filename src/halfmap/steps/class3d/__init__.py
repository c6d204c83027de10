"""Classification of particles by three-dimensional maps."""
