"""Curation: which micrographs to keep, and which parts of them are no specimen."""
