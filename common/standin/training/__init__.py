"""The training of the stand-ins."""
