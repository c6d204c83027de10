"""Networks: what they compute, the one loop that trains them, and the files that hold their weights."""
