"""The embedded default: scenes drawn from a seed, and small stand-ins for SAM and CLIP trained on such scenes."""
