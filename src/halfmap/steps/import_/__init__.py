"""Bring files from the microscope or from other programs into a project."""
