"""Systems that are not ours, on the same workload: Hugging Face transformers, and any server with an OpenAI endpoint.

Each is asked for greedy tokens, for exactly `num_output` of them: EOS ends nothing.
"""

from __future__ import annotations

import os
import time
import urllib.parse
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from flover.bench.engines import new_records, release, wait_until
from flover.bench.records import Job, Run, Watch
from flover.bench.systems import SystemMissing
from flover.config import EngineConfig
from flover.engine.engine import survey
from flover.resolve import effective_dtype

CPU_BLOCK = 256  # tokens in a block of transformers' cache, at least


class TransformersSystem:
    """`generate`, one request at a time, with a static cache: on a GPU transformers compiles the forward for it.

    Raises:
        SystemMissing: transformers is not installed.
        ValueError: a checkpoint that it cannot load.
    """

    def __init__(self, name: str, config: EngineConfig) -> None:
        if find_spec("transformers") is None:
            raise SystemMissing(f"{name} needs the package transformers: pip install transformers")
        hugging: Any = import_module("transformers")
        hugging.utils.logging.disable_progress_bar()
        self.name = name
        folder, shape, hardware, _ = survey(config)
        dtype: torch.dtype = getattr(torch, effective_dtype(config, shape, hardware.device))
        try:
            if config.load_format == "dummy":
                model = hugging.AutoModelForCausalLM.from_config(
                    hugging.AutoConfig.from_pretrained(folder), dtype=dtype
                )
            else:
                model = hugging.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except Exception as error:  # of transformers, of the hub client, of safetensors
            raise ValueError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:200]}") from None
        self.model: Any = model.to(hardware.device).eval()
        self.model.generation_config.eos_token_id = None

    def run(self, jobs: Sequence[Job], watch: Watch = None) -> Run:
        """As `records.System.run`."""
        run = Run(self.name, new_records(jobs))
        if watch is not None:
            watch(run.records)
        origin = time.monotonic()
        for job, record in zip(jobs, run.records):
            wait_until(origin + job.arrival)
            prompt = torch.tensor([job.prompt], device=self.model.device)
            ids = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=job.num_output,
                do_sample=False,
                cache_implementation="static",
                streamer=_Stopwatch(record.times, origin),
                pad_token_id=0,
            )
            record.token_ids = ids[0, len(job.prompt) :].tolist()
        return run

    def close(self) -> None:
        del self.model
        release()


class _Stopwatch:
    """A streamer of transformers that notes when each token is there; the prompt comes first."""

    def __init__(self, times: list[float], origin: float) -> None:
        self._times, self._origin, self._is_prompt = times, origin, True

    def put(self, value: object) -> None:
        if not self._is_prompt:
            self._times.append(time.monotonic() - self._origin)
        self._is_prompt = False

    def end(self) -> None:
        pass


class TransformersBatchSystem(TransformersSystem):
    """transformers' continuous batching, the manager behind `generate_batch`, which takes requests as they arrive."""

    def run(self, jobs: Sequence[Job], watch: Watch = None) -> Run:
        """As `TransformersSystem.run`. A token's time is transformers' own timestamp of it."""
        hugging: Any = import_module("transformers")
        run = Run(self.name, new_records(jobs))
        if watch is not None:
            watch(run.records)
        longest = max((job.num_output for job in jobs), default=1)
        fixed = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        settings = hugging.GenerationConfig(max_new_tokens=longest, **fixed)
        room = None
        if self.model.device.type == "cpu":  # by default it fills all memory with a cache and a mask as wide
            tokens = sum(len(job.prompt) + job.num_output + CPU_BLOCK for job in jobs)
            sizes = {"num_blocks": 2 * tokens // CPU_BLOCK + 1, "max_batch_tokens": min(max(tokens, 64), 2048)}
            room = hugging.ContinuousBatchingConfig(**sizes)
        with self.model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=room, timeout=5
        ) as manager:
            origin, stamps = time.monotonic(), time.perf_counter()
            given = finished = 0
            while finished < len(jobs):
                now = time.monotonic() - origin
                while given < len(jobs) and jobs[given].arrival <= now:
                    job = jobs[given]
                    manager.add_request(
                        list(job.prompt),
                        request_id=str(given),
                        max_new_tokens=job.num_output,
                        record_timestamps=True,
                        eos_token_id=-1,
                    )
                    given += 1
                left = jobs[given].arrival - now if given < len(jobs) else 1.0
                if left < 2e-3:
                    wait_until(origin + jobs[given].arrival)
                    continue
                result = manager.get_result(timeout=min(left - 1e-3, 1.0))
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("transformers' generation thread has ended")
                elif result.is_finished():
                    record = run.records[int(result.request_id)]
                    record.token_ids, record.error = list(result.generated_tokens), result.error
                    record.times = [stamp - stamps for stamp in result.timestamps or ()]
                    finished += 1
        return run


class OpenAISystem:
    """A server with /v1/completions that streams, takes token ids as a prompt and knows ignore_eos (vLLM, SGLang, ...).

    Args:
        url: of the server, with or without /v1.
        model: its name there; None: the first that /v1/models lists.

    Raises:
        SystemMissing: nothing answers there, or aiohttp is not installed. ValueError: no http(s) URL.
    """

    def __init__(self, name: str, url: str, model: str | None = None) -> None:
        self.name = name
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{name} needs a URL such as openai:http://localhost:8000")
        if find_spec("aiohttp") is None:
            raise SystemMissing(f'{name} needs aiohttp: pip install -e ".[bench]"')
        from flover.bench.client import Endpoint, first_model

        base = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get("OPENAI_API_KEY", "")
        try:
            model = model or first_model(base, key)["id"]
        except ValueError as error:
            raise SystemMissing(str(error)) from None
        self._endpoint = Endpoint(f"{base}/v1/completions", model, key=key)

    def run(self, jobs: Sequence[Job], watch: Watch = None) -> Run:
        """As `records.System.run`. A server that does not send token ids leaves them out."""
        from flover.bench.client import drive

        prompts = [job.prompt for job in jobs]
        return Run(self.name, drive(self._endpoint, jobs, prompts, watch=watch))

    def close(self) -> None:
        pass
