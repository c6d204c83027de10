"""Hand: whether a map or its mirror image is right, and the maps and poses of the right one."""
