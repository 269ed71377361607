"""Entry point of the command `hiera`, and of `python -m hiera_cli`."""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _end_at_once)
    from .app import main as run  # only now, because this import takes a moment

    run()


def _end_at_once(signum: int, frame: FrameType | None) -> None:
    """End while the modules are imported, when there is nothing to finish."""
    words = b"interrupted" if signum == signal.SIGINT else b"terminated"
    os.write(2, b"hiera: " + words + b"\n")
    os._exit(128 + signum)


if __name__ == "__main__":
    main()
