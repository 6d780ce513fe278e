"""matplotlib, set to write files only: it needs no screen and no backend of a notebook."""

import os
from pathlib import Path

from common.runtime.files import PNG_MARK, write_atomic

os.environ["MPLBACKEND"] = "Agg"  # before the import, which reads what a notebook has exported
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def save_figure(figure: Figure, path: Path) -> None:
    """As a marked PNG; the figure is closed."""
    write_atomic(path, lambda temporary: figure.savefig(
        temporary, dpi=110, format="png", metadata=dict([PNG_MARK])))
    plt.close(figure)
