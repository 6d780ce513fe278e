"""matplotlib, set to write files only: it needs no screen and no backend of a notebook."""

import os

os.environ["MPLBACKEND"] = "Agg"  # before the import, which reads what a notebook has exported
import matplotlib.pyplot as plt  # noqa: E402

__all__ = ["plt"]
