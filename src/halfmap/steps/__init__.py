"""The jobs of the pipeline, one folder each."""
