"""Two maps side by side: where they agree, and where they differ by more than their noise."""
