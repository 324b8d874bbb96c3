"""`flover serve` as the child of a Ray actor: it ends when its parent does, however that ends.

The actor holds the other end of stdin. Its end is the end of this process; the engine below follows (`lifeline`).
"""

from __future__ import annotations

import os
import runpy
import threading


def main() -> None:
    """Arguments are those of `flover`."""
    stdin = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)

    def watch() -> None:
        os.read(stdin, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    runpy.run_module("flover", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
