"""A process that ends with its parent, and says what its threads do when asked; and how it ended, in words.

On Linux the kernel sends a death signal. Elsewhere, and besides, a child holds a socket to its parent: its end is the
parent's end (`engine.process`, `server.front`).
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
GRACE = 3.0  # seconds to end in order, once the parent has gone


def end_with_parent(parent: int) -> None:
    """Call it first, from the main thread. Signals of a terminal or a service manager are the parent's business.

    Args:
        parent: its process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    die_with_parent()
    if sys.platform == "linux" and os.getppid() != parent:  # it died before that
        sys.exit(1)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # a watchdog asks, before it kills


def die_with_parent() -> None:
    """On Linux: SIGKILL when the thread ends that started this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def ending(code: int) -> str:
    """How a process ended, by the exit code that `subprocess` gives."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def end_soon() -> None:
    """The parent has gone: end within `GRACE` seconds, however busy the main thread is."""
    timer = threading.Timer(GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()
