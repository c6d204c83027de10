"""Classification of particles in two dimensions."""
