"""Halfmap: single-particle cryo-EM from the microscope's movies to a validated map."""

__version__ = "0.1.0"
