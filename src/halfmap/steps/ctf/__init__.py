"""CTF estimation: defocus, astigmatism, phase shift and tilt of micrographs, with their errors."""
