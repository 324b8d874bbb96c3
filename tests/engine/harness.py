"""Engines for tests: EchoModel cores, random traces, and the serial run that they are compared with."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.request import FinishReason, Request, RowSampling

VOCAB = 97
MODEL_LEN = 96


def echo_folder(path: Path, **overrides: Any) -> Path:
    """A checkpoint folder of EchoModel: a config.json is all it needs."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["EchoModel"],
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": MODEL_LEN,
        "eos_token_id": None,
        **overrides,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def echo_core(folder: Path, **options: Any) -> EngineCore:
    settings = {"max_num_seqs": 6, "load_format": "dummy", "device": "cpu", "debug_poison": True, **options}
    return EngineCore(EngineConfig(model=str(folder), **settings))


@dataclass
class Job:
    """A request of a trace. `abort_after`: withdrawn once it has that many tokens (0: at once)."""

    prompt: list[int]
    max_tokens: int
    arrival_step: int = 0
    stop_ids: frozenset[int] = frozenset()
    abort_after: int | None = None
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Outcome:
    tokens: dict[int, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    steps: int = 0
    rows: int = 0
    preemptions: int = 0


def random_jobs(rng: random.Random, count: int, *, max_len: int = MODEL_LEN, aborts: bool = True) -> list[Job]:
    """Random arrivals, lengths (log-uniform-ish), stop ids, aborts; some share a prefix."""
    stem = [rng.randrange(VOCAB) for _ in range(max_len)]
    jobs = []
    sampled = rng.random() < 0.3
    for _ in range(count):
        length = rng.randint(1, rng.choice([4, 20, max_len - 1]))
        shared = rng.randint(0, length) if rng.random() < 0.4 else 0
        prompt = stem[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]
        max_tokens = rng.randint(1, min(rng.choice([3, 16, 60]), max(1, max_len - length)))
        job = Job(prompt, max_tokens, rng.randint(0, 40) if rng.random() < 0.7 else 0)
        if rng.random() < 0.4:
            job.stop_ids = frozenset(rng.sample(range(VOCAB), 8))
        if aborts and rng.random() < 0.15:
            job.abort_after = rng.randint(0, 10)
        if sampled and rng.random() < 0.5:
            job.temperature, job.seed = 0.2, rng.randrange(2**40)
        jobs.append(job)
    return jobs


def as_request(index: int, job: Job) -> Request:
    return Request(
        request_id=f"r{index}",
        token_ids=list(job.prompt),
        sampling=RowSampling(seed=job.seed, temperature=job.temperature),
        max_output_tokens=job.max_tokens,
        stop_token_ids=job.stop_ids,
    )


def run(core: EngineCore, jobs: list[Job], *, limit: int = 20_000) -> Outcome:
    """Drive a trace to its end; every request must end exactly once."""
    outcome = Outcome()
    pending = sorted(range(len(jobs)), key=lambda i: jobs[i].arrival_step)
    requests: dict[str, tuple[int, Request]] = {}
    step = 0
    while pending or core.has_unfinished():
        while pending and jobs[pending[0]].arrival_step <= step:
            index = pending.pop(0)
            request = as_request(index, jobs[index])
            requests[request.request_id] = (index, request)
            core.add(request)
            if jobs[index].abort_after == 0:
                core.finish(request.request_id, FinishReason.ABORT)
        output = core.step()
        core.scheduler.kv.check()
        for request in output.requests:
            index = requests[request.request_id][0]
            if jobs[index].abort_after and request.num_output_tokens >= jobs[index].abort_after:
                core.finish(request.request_id, FinishReason.ABORT)
        for request in output.finished:
            index = requests[request.request_id][0]
            assert index not in outcome.reasons, f"{request.request_id} ended twice"
            outcome.tokens[index] = request.output_token_ids
            outcome.reasons[index] = request.finish_reason.value
            outcome.preemptions += request.num_preemptions
        if output.stats is not None:
            outcome.rows += output.stats.num_running
        step += 1
        assert step < limit, "no progress"
    assert len(outcome.reasons) == len(jobs)
    kv = core.scheduler.kv
    assert kv.num_used_blocks == 0, "blocks leaked"
    outcome.steps = step
    return outcome


def prefix_equal(expected: Outcome, actual: Outcome, jobs: list[Job]) -> None:
    """Equal tokens and reasons; an aborted request may differ in how far it got, never in what it got."""
    for index, job in enumerate(jobs):
        a, b = expected.tokens[index], actual.tokens[index]
        if job.abort_after is None:
            assert a == b, f"request {index}: {a} != {b}"
            assert expected.reasons[index] == actual.reasons[index], index
        else:
            n = min(len(a), len(b))
            assert a[:n] == b[:n], index
