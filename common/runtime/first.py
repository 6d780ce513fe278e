"""Imported before all else by every program, for what must be settled before torch is imported."""

import os
import signal
import sys
from types import FrameType

# Torch's threads sleep while they wait: beside another busy process, spinning makes it crawl. Read
# when torch is loaded. What the user has set stands.
if "GOMP_SPINCOUNT" not in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def stop(number: int, frame: FrameType | None) -> None:
    """Ends the process on Ctrl-C without a traceback; nothing has been computed yet."""
    os.write(2, b"\nstopped; run the same command to go on\n")
    os._exit(130)


def imports_are_done() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, so that files are closed properly."""
    if signal.getsignal(signal.SIGINT) is stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _imported_by_the_program() -> bool:
    """Whether the started program imports this, not a test or a notebook that loads a script."""
    frame = sys._getframe(2)
    while "importlib" in frame.f_globals["__name__"]:
        frame = frame.f_back
    return frame.f_globals["__name__"] == "__main__"


# not where SIGINT is ignored, as under nohup
if _imported_by_the_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
