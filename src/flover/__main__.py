"""`python -m flover`, and the command `flover`.

Until the command line is imported Ctrl-C ends the process as any other, without a traceback.
"""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """-> exit code."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, and stays so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from flover.cli import main as run

    signal.signal(signal.SIGINT, handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
