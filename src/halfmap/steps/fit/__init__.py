"""An atomic model put into a map, and how well each of its parts fits there."""
