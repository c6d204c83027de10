"""What a step is and how it runs: parameters, context, executors, resume."""
