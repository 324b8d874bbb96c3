"""What a result is kept with, and how: when, where and by what it was made; files that are whole or not there."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def provenance(device: str | None, script: bool = False) -> dict[str, Any]:
    """When, with what command, versions and commit, on what machine; without a device (a client) nothing of torch.

    script: this process runs a script, not `flover`.
    """
    import numpy as np

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv] if script else ["flover", *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cores": os.cpu_count(),
        **_environment(device),
    }


def _commit() -> str | None:
    """Of this package's own checkout, "-dirty" if it differs; None where it is installed, inside another's too."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True)

    try:
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        dirty = "-dirty" if git("diff", "--quiet", "HEAD", "--", ".").returncode else ""
        return git("rev-parse", "--short", "HEAD").stdout.strip() + dirty
    except OSError:  # no git
        return None


def _environment(device: str | None) -> dict[str, Any]:
    if device is None:
        return {"platform": platform.platform()}
    from flover.profile import environment  # of torch

    return environment(device)


def check_output(path: Path | None, option: str) -> None:
    """What `write_text` would fail at, before a run instead of after it; ValueError."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{option}: folder {path.parent} does not exist")
    if path.exists() and not path.is_file():  # a device would be replaced
        raise ValueError(f"{option}: {path} is {'a folder' if path.is_dir() else 'no regular file'}")
    partial = _partial(path)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be written: {error.strerror}") from None


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
