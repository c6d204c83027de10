"""Halfmap: single-particle cryo-EM from the microscope's movies to a validated map."""

from halfmap.kernel_cache import ensure_kernel_cache

__version__ = "0.1.0"

ensure_kernel_cache()
