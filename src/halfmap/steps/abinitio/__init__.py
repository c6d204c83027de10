"""Maps from particles without a reference."""
