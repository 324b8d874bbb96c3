"""Requests of others: traces in JSON lines, and the lengths of published ones as parameters, so that none is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flover.bench.records import Job
from flover.bench.workload import (
    ARRIVALS,
    P90,
    TOKENS,
    Arrivals,
    At,
    Exponential,
    Lengths,
    Lognormal,
    Normal,
    Uniform,
    fit,
    fixed,
    stream,
)
from flover.request import nearest

TRACE_LINE = '{"arrival": 0.5, "num_prompt": 128, "num_output": 32}'


@dataclass(frozen=True, slots=True)
class TraceLine:
    """A request of a trace: seconds, tokens, and the prompt itself if the file has it."""

    arrival: float
    num_prompt: int
    num_output: int
    prompt: tuple[int, ...] | None
    where: str


def read_trace(path: Path) -> list[TraceLine]:
    """A JSON lines file, sorted by arrival: `arrival` (s), `num_output`, `num_prompt` or `prompt_token_ids`.

    Raises:
        ValueError: a line that is none, naming file, line, value and what would do. OSError: no such file.
    """
    lines = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                lines.append(_trace_line(json.loads(raw), f"{path}:{number}: "))
            except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
                raise ValueError(f"{path}:{number}: {error}; a line is {TRACE_LINE}") from None
    if not lines:
        raise ValueError(f"{path} holds no request; a line is {TRACE_LINE}")
    return sorted(lines, key=lambda line: line.arrival)


def _trace_line(entry: Any, where: str) -> TraceLine:
    if not isinstance(entry, dict):
        raise ValueError(f"a line must be a JSON object, got {entry!r}")
    arrival = entry.get("arrival")
    if isinstance(arrival, bool) or not isinstance(arrival, (int, float)) or not math.isfinite(arrival):
        raise ValueError(f"arrival must be a number of seconds, got {arrival!r}")
    ids = entry.get("prompt_token_ids")
    if ids is None:
        return TraceLine(float(arrival), _tokens(entry, "num_prompt"), _tokens(entry, "num_output"), None, where)
    if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"prompt_token_ids must be a list of token ids, got {str(ids)[:60]}")
    if entry.get("num_prompt", len(ids)) != len(ids):
        raise ValueError(f"num_prompt is {entry['num_prompt']!r}, prompt_token_ids are {len(ids)}: leave one out")
    return TraceLine(float(arrival), len(ids), _tokens(entry, "num_output"), tuple(ids), where)


def _tokens(entry: dict[str, Any], name: str) -> int:
    value = entry.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a number of tokens, at least 1, got {value!r}")
    return value


def trace_jobs(
    lines: Sequence[TraceLine],
    vocab_size: int,
    seed: int,
    max_model_len: int,
    arrivals: Arrivals | None = None,
    shrink: bool = False,
) -> list[Job]:
    """Jobs of a trace, in its order; prompts that it has not are random ids. Arguments as of `make_jobs`.

    Args:
        arrivals: instead of the trace's own.

    Raises:
        ValueError: a request that does not fit, or a token id that the model has not, naming file and line.
    """
    law = arrivals or At([line.arrival for line in lines])
    times = law.draw(len(lines), stream(seed, ARRIVALS)).tolist()
    tokens = stream(seed, TOKENS)
    jobs = []
    for time, line in zip(times, lines):
        prompt = line.prompt or tuple(tokens.integers(0, vocab_size, line.num_prompt).tolist())
        if max(prompt) >= vocab_size:
            raise ValueError(f"{line.where}token id {max(prompt)} is not below the vocabulary's {vocab_size}")
        try:
            n, m = fit(line.num_prompt, line.num_output, max_model_len, shrink)
        except ValueError as error:
            raise ValueError(f"{line.where}{error}") from None
        jobs.append(Job(time, prompt[:n], m))
    return jobs


# ---- published -------------------------------------------------------------------------------------------------------

SEEN, RECALLED, OURS = "seen", "recalled", "ours"
FIT = "lognormal by"


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths of a published workload.

    Args:
        source: whose they are. mark: whether the source's numbers were `seen` there or are `recalled` (to be checked
            before they are quoted as facts); `ours` is no one else's. shape: what the parameters were made from.
    """

    prompt: Lengths
    output: Lengths
    source: str
    mark: str
    shape: str


WORKLOADS = {
    "uniform": Workload(
        Uniform(100, 1024),
        Uniform(100, 1024),
        "nano-vllm, mini-sglang: offline benchmark",
        SEEN,
        "exact",
    ),
    "chat": Workload(
        Normal(512, 128, 1, 1024), Normal(256, 64, 1, 1024), "GuideLLM: scenarios/chat.json", SEEN, "exact"
    ),
    "sharegpt": Workload(
        Lognormal.of_mean(215, 1.1),
        Lognormal.of_mean(179, 1.0),
        "ShareGPT: 1,000 prompts as vLLM's bench samples them, Llama-3 tokens (vLLM issue 7567)",
        SEEN,
        f"{FIT} mean; sigma 1.1 and 1.0 are assumed",
    ),
    "sharegpt-distserve": Workload(
        Lognormal(math.log(695), math.log(1556 / 695) / P90),
        Lognormal(4.47, 1.29),
        "ShareGPT as in DistServe (OSDI 24)",
        RECALLED,
        f"{FIT} median and p90 (prompt: 695, 1556), median and mean (output: 87, 200)",
    ),
    "sharegpt4-sarathi": Workload(
        Lognormal(7.46, 0.93),
        Lognormal(6.03, 0.54),
        "openchat_sharegpt4 as in Sarathi-Serve (OSDI 24)",
        RECALLED,
        f"{FIT} median and p90 (1730, 5696; 415, 834)",
    ),
    "arxiv-sarathi": Workload(
        Lognormal(8.86, 0.48),
        Lognormal(5.34, 0.45),
        "arxiv_summarization as in Sarathi-Serve (OSDI 24)",
        RECALLED,
        f"{FIT} median and p90 (7059, 12985; 208, 371)",
    ),
    "azure-conv": Workload(
        Lognormal(6.93, 0.50),
        Lognormal(4.86, 0.99),
        "Azure LLM inference trace 2023, conversation (Splitwise, ISCA 24; CC-BY)",
        RECALLED,
        f"{FIT} median and mean (1020, 1155; 129, 211)",
    ),
    "azure-code": Workload(
        Lognormal(7.31, 0.79),
        Lognormal(2.56, 1.24),
        "Azure LLM inference trace 2023, code (Splitwise, ISCA 24; CC-BY)",
        RECALLED,
        f"{FIT} median and mean (1500, 2048; 13, 28)",
    ),
    "mooncake": Workload(
        fixed(7590), fixed(182), "Mooncake (arXiv 2407.00079)", SEEN, "means only: no shape was published with them"
    ),
    "long-tail": Workload(
        fixed(128), Exponential(256, 1024), "the case where a batch that leaves together loses most", OURS, "exact"
    ),
}


def named(name: str) -> Workload:
    """A published workload; ValueError for an unknown name."""
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}{nearest(name, set(WORKLOADS))}; known: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
