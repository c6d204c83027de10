"""Selection: which classes of a two-dimensional classification to keep, and which of their particles."""
