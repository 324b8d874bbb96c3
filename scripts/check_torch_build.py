"""Refuse to download gigabytes of CUDA onto a machine that has no NVIDIA GPU.

Usage: python scripts/check_torch_build.py "torch==X" [--index-url URL]

Asks pip what it would install (metadata only). Where there is a GPU, or torch is there already, it has nothing to say.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys


def main() -> int:
    if importlib.util.find_spec("torch") or shutil.which("nvidia-smi"):
        return 0
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *sys.argv[1:]]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(result.stderr.strip() or "pip could not resolve torch", file=sys.stderr)
        return 1
    names = [item["metadata"]["name"] for item in json.loads(result.stdout)["install"]]
    cuda = [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    if cuda:
        print(
            f"{sys.argv[1]} from the default index would bring {len(cuda)} CUDA packages (gigabytes), and this machine "
            "has no NVIDIA GPU.\nPass the CPU index that pytorch.org's install page names: make TORCH_INDEX=<url>",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
