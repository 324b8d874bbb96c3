"""`flover serve`: the options of the server as `flover.server` wants them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from flover.engine.launch import launched
from flover.server.config import ServerConfig

KEYS = "FLOVER_API_KEY"


def run_serve(api_keys: Sequence[str], server: Mapping[str, Any], engine: Mapping[str, Any]) -> int:
    """-> exit code."""
    need_packages()
    from flover.server.serve import run

    config = ServerConfig(**server, api_keys=all_keys(api_keys))
    if config.otlp_traces_endpoint:
        from flover.server.tracing import check_tracing

        check_tracing()
    if launched() is not None:  # the other ranks end with an engine, and only torchrun starts them again
        config = replace(config, max_restarts=0)
    return run(config, {"order": "fair", **engine})


def all_keys(given: Sequence[str]) -> list[str]:
    """Keys of the command line, and those of the environment, separated by commas."""
    environment = os.environ.pop(KEYS, "")  # the engine's process has no use for it
    return [*given, *(environment.split(",") if environment else ())]


def run_batch_file(input: Path, output: Path, engine: Mapping[str, Any]) -> int:
    """-> exit code: 1 if a request failed."""
    need_packages()
    from flover.server.batch import run_batch

    served, failed = run_batch(input, output, engine)
    print(f"{output}: {served} served, {failed} failed", file=sys.stderr)
    return int(failed > 0)


def names(option: str, given: Sequence[str]) -> list[str]:
    """Values of an option that may be repeated, each a name or, as in vLLM, a JSON list of them; ValueError."""
    found: list[str] = []
    for text in given:
        try:
            some = msgspec.json.decode(text, type=list[str]) if text.startswith("[") else [text]
        except ValueError:
            raise ValueError(f"{option} must be a name or a JSON list of them, got {text!r}") from None
        found += some
    return found


def need_packages() -> None:
    """ValueError if a package of the server is not installed."""
    for package in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
        if find_spec(package) is None:
            raise ValueError(f'the server needs {package}: pip install -e ".[server]"')
