"""What is never trained: SAM, CLIP Surgery, and their weights."""
