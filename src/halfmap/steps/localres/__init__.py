"""Local resolution of two half maps, by their correlation and by their signal over their noise."""
