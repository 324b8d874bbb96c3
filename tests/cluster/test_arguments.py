"""The command line of a replica's server: parsed again, it has the settings that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest

from flover.cli import main
from flover.cli.cluster import arguments

MANY = """serve kjv-gpt2 --served-model-name a --served-model-name b --allowed-origins http://x.org --allowed-origins
 http://y.org --allowed-methods ["GET","POST"] --max-queued-requests 7 --queue-timeout 2.5 --log-prompts
 --tool-call-parser hermes --max-num-seqs 9 --no-enable-prefix-caching --batch-invariant --dtype float32"""


@pytest.mark.parametrize("command", ["serve", "serve --metrics-compat vllm", MANY])
def test_settings_survive(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Any, ...]] = []

    def taken(model: str | None, keys: Sequence[str], server: dict[str, Any], engine: dict[str, Any]) -> int:
        given.append((model, server, engine))
        return 0

    monkeypatch.setattr(import_module("flover.cli.serve"), "run_serve", taken)
    assert main(command.split()) == 0
    assert main(["serve", *arguments(*given[0])]) == 0
    assert given[0] == given[1]
