"""The project folder in RELION's shape: jobs, graph, status."""

from halfmap.project.job import Job
from halfmap.project.project import Project

__all__ = ["Job", "Project"]
