"""What the four numbered scripts share: one concept per file, imports running one way."""
