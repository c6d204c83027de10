"""Extraction: particle images cut out of micrographs, normalised, with their CTFs."""
