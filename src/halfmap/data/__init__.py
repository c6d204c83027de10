"""The tables and arrays that the pipeline hands on: micrographs, particles, optics, poses, CTFs."""
