"""The command line of a replica's server: parsed again, it has the settings that it was made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
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

    def taken(keys: Sequence[str], server: dict[str, Any], engine: dict[str, Any]) -> int:
        given.append((server, engine))
        return 0

    monkeypatch.setattr(import_module("flover.cli.serve"), "run_serve", taken)
    assert main(command.split()) == 0
    assert main(["serve", *arguments(*given[0])]) == 0
    assert given[0] == given[1]


def test_replicas_take_all_keys_and_have_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    for name, taken in (
        ("flover.cli.cluster._listener", lambda *_: nullcontext()),
        ("flover.cli.cluster._serve", lambda *_: 0),
        ("flover.cluster.ray.connected", lambda *_: nullcontext()),
        ("flover.cluster.ray.up", lambda _, words, ranks, drain: given.extend((os.environ["FLOVER_API_KEY"], ranks))),
        ("flover.cluster.ray.down", lambda *_: True),
    ):
        monkeypatch.setattr(name, taken)
    monkeypatch.setenv("FLOVER_API_KEY", "a,b")
    assert main(["serve", "--replicas", "1", "--api-key", "c", "-tp", "2", "-pp", "2"]) == 0
    assert given == ["c,a,b", 4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("serve --replicas 1 --api-key=", "an API key is empty"),
        ("serve --replicas 1 --max-queued-requests -1", "max_queued_requests must be at least 1, got -1"),
        ("serve --replicas 1 --max-num-seqs 0", "max_num_seqs must be an integer of at least 1, got 0"),
        ("serve --replicas 1 --cpus nan", "cpus must be a number of at least 0, got nan"),
        ("cluster up --gpus -1", "gpus must be a number of at least 0, got -1"),
        ("cluster up --drain-timeout -1", "drain_timeout must be a number of seconds, got -1"),
        ("cluster ingress --port 99999", "port must be in [0, 65535], got 99999"),
        ("run-batch -i a -o b --ray --replicas 0", "replicas must be at least 1, got 0"),
        ("run-batch -i a -o b --ray --cpus nan", "cpus must be a number of at least 0, got nan"),
        ("run-batch -i a -o b --replicas 2", "--replicas, --ray-address and --cpus need --ray"),
        ("serve a --replicas 1 --model b", "give the model once, got 'a' and --model 'b'"),
        ("cluster up a --model b", "give the model once, got 'a' and --model 'b'"),
        ("plan a --model b", "give the model once, got 'a' and --model 'b'"),
        ("cluster up -tp 0", "tensor_parallel_size must be an integer of at least 1, got 0"),
    ],
)
def test_settings_that_no_replica_would_take(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLOVER_API_KEY", raising=False)
    monkeypatch.setattr("flover.cluster.ray.connected", lambda *_: pytest.fail("Ray was started"))
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_a_rank_of_torchrun_does_not_start_engines_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks are gone with the first."""
    given: list[Any] = []
    monkeypatch.setattr("flover.server.serve.run", lambda config, engine: given.append(config.max_restarts) or 0)
    assert main(["serve"]) == 0
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLOVER_COMMAND", "")  # which main sets, to be undone
    assert main(["serve", "-tp", "2"]) == 0
    assert given == [5, 0]
