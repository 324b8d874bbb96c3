"""`flover run-batch --ray`: a batch file over Ray Data, of any size: blocks of lines, each to one of several engines.

Lines go through the same application as `flover run-batch` (`server.batch`) and come back in any order; each result
carries its custom_id. A block whose engine or node is lost is done again elsewhere.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

BLOCK = 1024  # lines that an engine is handed at a time: enough to fill its batch for a while


class Engine:
    """An engine in a Ray actor; called with lines, it gives results."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        from flover.async_llm import AsyncLLM

        self._llm = AsyncLLM(**options)
        self._loop = asyncio.new_event_loop()

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        from flover.server.batch import serve_file

        with TemporaryDirectory() as folder:
            lines, results = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
            lines.write_text("".join(f"{line}\n" for line in batch["text"]), encoding="utf-8")
            with open(results, "wb") as file:
                self._loop.run_until_complete(serve_file(self._llm, lines, file))
            return {"text": results.read_text(encoding="utf-8").splitlines()}


def run_batch_ray(
    input: Path, output: Path, engine: Mapping[str, Any], address: str | None, engines: int, cpus: float
) -> int:
    """-> lines written to `output`, which takes its name once all are there.

    Args:
        engines: that work at a time. cpus: of each, for Ray; on a cluster with GPUs each takes its ranks' GPUs too.

    Raises:
        ValueError: an input that is not there, a head that cannot be reached.
    """
    if not input.is_file():
        raise ValueError(f"there is no file {input}")
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent}")
    from flover.cluster.ray import connected

    with connected(address):
        import ray

        try:
            from ray.data import ActorPoolStrategy
        except ImportError as error:
            raise ValueError(f'Ray Data needs {error.name}: pip install "flover[ray]"') from None
        gpus = engine.get("tensor_parallel_size", 1) if ray.cluster_resources().get("GPU") else 0
        results = ray.data.read_text(str(input.absolute())).map_batches(
            Engine,
            fn_constructor_args=(dict(engine),),
            compute=ActorPoolStrategy(size=engines),
            batch_size=BLOCK,
            num_cpus=cpus,
            num_gpus=gpus,
        )
        partial = output.with_name(f"{output.name}.partial")
        count = 0
        with open(partial, "w", encoding="utf-8") as file:
            for row in results.iter_rows():
                file.write(f"{row['text']}\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, output)
    return count
