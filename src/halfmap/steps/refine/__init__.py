"""Refinement of one map from two independent half sets."""
