"""Pose search and reconstruction, shared by classification in two dimensions and refinement in three."""
