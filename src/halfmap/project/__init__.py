"""The project folder in RELION's shape: jobs, graph, status."""
