"""The whole chain as one command: what to run next, why, and what came of it."""
