"""`flover run-batch --ray`: a batch file over Ray Data, of any size: blocks of lines, each to one of several engines.

Lines go through the same application as `flover run-batch` (`server.batch`) and come back in any order; each result
carries its custom_id. A block whose engine or node is lost is done again elsewhere. What Ray hands round is where a
block lies in the file: no task reads it first, so engines may have all CPUs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from flover.config import EngineConfig

BLOCK = 1024  # lines that an engine is handed at a time, at most: enough to fill its batch for a while


class Engine:
    """An engine in a Ray actor; called with where lines of `input` begin and end, it gives their results."""

    def __init__(self, input: Path, options: Mapping[str, Any]) -> None:
        from flover.async_llm import AsyncLLM

        self._input = input
        self._llm = AsyncLLM(**options)
        self._loop = asyncio.new_event_loop()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        from flover.server.batch import serve_lines

        lines = BytesIO()
        with open(self._input, "rb") as file:
            for begin, end in zip(batch["begin"].tolist(), batch["end"].tolist()):
                file.seek(begin)
                lines.write(file.read(end - begin))
        lines.seek(0)
        results: list[tuple[bytes, bool]] = []
        self._loop.run_until_complete(serve_lines(self._llm, lines, lambda *one: results.append(one)))
        return {"text": [text.decode() for text, _ in results], "failed": [failed for _, failed in results]}


def run_batch_ray(
    input: Path, output: Path, engine: Mapping[str, Any], address: str | None, engines: int, cpus: float
) -> tuple[int, int]:
    """-> requests served, requests that failed; `output` takes its name once all are there.

    Args:
        engines: that work at a time. cpus: of each, for Ray; on a cluster with GPUs each takes its ranks' GPUs too.

    Raises:
        ValueError: files as `partial_path` says, a head that cannot be reached, more engines than there is room for.
    """
    from flover.cluster.ray import ClusterConfig, check_room, connected
    from flover.server.batch import partial_path

    ClusterConfig(replicas=engines, cpus=cpus)  # checks them
    ranks = EngineConfig(**engine).num_ranks
    partial = partial_path(input, output)
    with connected(address):
        import ray

        try:
            from ray.data import ActorPoolStrategy
        except ImportError as error:
            raise ValueError(f'Ray Data needs {error.name}: pip install -e ".[ray]"') from None
        gpus = ranks if ray.cluster_resources().get("GPU") else 0
        check_room(engines, cpus, gpus)
        blocks = _blocks(input, engines)
        results = ray.data.from_items(blocks, override_num_blocks=len(blocks) or None).map_batches(
            Engine,
            fn_constructor_args=(input.absolute(), dict(engine)),
            compute=ActorPoolStrategy(size=engines),
            batch_size=1,
            num_cpus=cpus,
            num_gpus=gpus,
        )
        counts = [0, 0]
        with open(partial, "w", encoding="utf-8") as file:
            for row in results.iter_rows():
                file.write(f"{row['text']}\n")
                counts[row["failed"]] += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, output)
    return counts[0], counts[1]


def _blocks(input: Path, engines: int) -> list[dict[str, int]]:
    """Where blocks of lines begin and end; of a short file every engine gets some."""
    with open(input, "rb") as file:
        count = sum(1 for _ in file)
        size, blocks, begin, end = min(BLOCK, -(-count // engines)), list[dict[str, int]](), 0, 0
        file.seek(0)
        for number, line in enumerate(file, 1):
            end += len(line)
            if number % size == 0 or number == count:
                blocks.append({"begin": begin, "end": end})
                begin = end
    return blocks
