"""Requests of others: traces in JSON lines, and the lengths of published ones as parameters, so that none is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flover.bench.records import Job
from flover.bench.workload import (
    ARRIVALS,
    MOST_TOKENS,
    P90,
    TOKENS,
    Arrivals,
    At,
    Exponential,
    Lengths,
    Lognormal,
    Normal,
    Percentiles,
    Uniform,
    Zipf,
    fit,
    fixed,
    stream,
)
from flover.show import nearest

TRACE_LINE = '{"arrival": 0.5, "num_prompt": 128, "num_output": 32}'
CUSTOM_LINE = '{"prompt": "Who was Moses?", "output_tokens": 32}'
T = TypeVar("T")


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
    return sorted(_json_lines(path, _trace_line, TRACE_LINE), key=lambda line: line.arrival)


def read_custom(path: Path) -> list[tuple[str, int | None]]:
    """A JSON lines file of `prompt`, a text, and `output_tokens` where they are known: vLLM's custom data set.

    Raises:
        ValueError, OSError: as of `read_trace`.
    """
    return _json_lines(path, _custom_line, CUSTOM_LINE)


def _json_lines(path: Path, parse: Callable[[dict[str, Any], str], T], example: str) -> list[T]:
    lines = []
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                entry = json.loads(raw)
                if not isinstance(entry, dict):
                    raise ValueError(f"a line must be a JSON object, got {entry!r}")
                lines.append(parse(entry, f"{path}:{number}: "))
            except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
                raise ValueError(f"{path}:{number}: {error}; a line is {example}") from None
    if not lines:
        raise ValueError(f"{path} holds no request; a line is {example}")
    return lines


def _custom_line(entry: dict[str, Any], where: str) -> tuple[str, int | None]:
    prompt = entry.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt must be a text, got {str(prompt)[:60]!r}")
    return prompt, None if entry.get("output_tokens") is None else _tokens(entry, "output_tokens")


def _trace_line(entry: dict[str, Any], where: str) -> TraceLine:
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
    if type(value) is not int or not 1 <= value <= MOST_TOKENS:
        raise ValueError(f"{name} must be a number of tokens, 1 to {MOST_TOKENS}, got {value!r}")
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


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths of a published workload, and how bursty its arrivals are.

    Args:
        source: whose they are. shape: what the parameters were made from.
        mark: whether the source's numbers were `seen` there, or are `recalled` and to be checked before they are quoted
            as facts; `ours` are nobody else's.
        burstiness: of arrivals, as `workload.Gamma` has it; 1 (Poisson) where the source says nothing.
    """

    prompt: Lengths
    output: Lengths
    source: str
    mark: str
    shape: str
    burstiness: float = 1.0


MEASURED = "percentiles of the trace itself"
AZURE = "Azure LLM inference trace 2023 (CC-BY; Patel et al., Splitwise, ISCA 24)"
AZURE_24 = "Azure LLM inference trace 2024 (CC-BY; Stojkovic et al., DynamoLLM, HPCA 25)"
READ = (
    "percentiles 50, 90, 99, 100 (outputs: 95) as others computed them of the whole trace, the rest read off plots of"
    " its notebook; outputs below the median and at 99.9 % assumed, so that the mean is right; burstiness unknown"
)
WORKLOADS = {
    "uniform": Workload(
        Uniform(100, 1024), Uniform(100, 1024), "nano-vllm and mini-sglang, offline benchmark", SEEN, "exact"
    ),
    "chat": Workload(
        Normal(512, 128, 1, 1024), Normal(256, 64, 1, 1024), "GuideLLM, scenarios/chat.json", SEEN, "exact"
    ),
    "sharegpt": Workload(
        Lognormal.of_mean(215, 1.1),
        Lognormal.of_mean(179, 1.0),
        "ShareGPT, 1,000 prompts as vLLM's bench samples them, Llama-3 tokens (vLLM issue 7567)",
        SEEN,
        "lognormal by mean; sigma 1.1 and 1.0 are assumed",
    ),
    "sharegpt-distserve": Workload(
        Lognormal(math.log(695), math.log(1556 / 695) / P90),
        Lognormal(4.47, 1.29),
        "ShareGPT as in DistServe (OSDI 24)",
        RECALLED,
        "lognormal by median and p90 (prompt: 695, 1556), by median and mean (output: 87, 200)",
    ),
    "sharegpt4-sarathi": Workload(
        Lognormal(7.46, 0.93),
        Lognormal(6.03, 0.54),
        "openchat_sharegpt4 as in Sarathi-Serve (OSDI 24)",
        RECALLED,
        "lognormal by median and p90 (1730, 5696; 415, 834)",
    ),
    "arxiv-sarathi": Workload(
        Lognormal(8.86, 0.48),
        Lognormal(5.34, 0.45),
        "arxiv_summarization as in Sarathi-Serve (OSDI 24)",
        RECALLED,
        "lognormal by median and p90 (7059, 12985; 208, 371)",
    ),
    # 19,366 requests of one hour, 5.5 a second; means 1155 and 211
    "azure-conv": Workload(
        Percentiles((2, 29, 181, 207, 387, 403, 703, 1020, 1071, 1130, 1315, 2734, 4083, 4142, 6179, 14050)),
        Percentiles((7, 16, 41, 54, 77, 91, 103, 129, 177, 384, 400, 424, 451, 601, 954, 1000)),
        f"{AZURE}, conversation",
        SEEN,
        f"{MEASURED}; burstiness from the variation of its gaps (1.09)",
        0.84,
    ),
    # 8,819 requests, 2.6 a second; means 2048 and 28. Its gaps vary 13-fold: silence between bursts, no gamma law
    "azure-code": Workload(
        Percentiles((3, 17, 75, 147, 386, 770, 1075, 1469, 1909, 2433, 3192, 5188, 7303, 7436, 7437, 7437)),
        Percentiles((6, 6, 6, 7, 8, 9, 11, 13, 16, 20, 29, 55, 90, 251, 825, 1899)),
        f"{AZURE}, code",
        SEEN,
        MEASURED,
    ),
    # 27.3 million requests of a week, 45.1 a second; means 1632 and 106
    "azure-conv-2024": Workload(
        Percentiles((1, 86, 202, 292, 445, 549, 603, 928, 1686, 2105, 2657, 3830, 4879, 6683, 7540, 7999)),
        Percentiles((1, 2, 3, 6, 13, 19, 30, 41, 52, 75, 173, 342, 455, 694, 1072, 1500)),
        f"{AZURE_24}, conversation",
        SEEN,
        READ,
    ),
    # 16.8 million requests of a week, 27.8 a second; means 2511 and 23
    "azure-code-2024": Workload(
        Percentiles((1, 12, 122, 315, 721, 1122, 1488, 1930, 2378, 2939, 3850, 6251, 7662, 7685, 7690, 7743)),
        Percentiles((1, 1, 1, 2, 3, 4, 6, 8, 10, 14, 21, 43, 79, 271, 600, 5000)),
        f"{AZURE_24}, code",
        SEEN,
        READ,
    ),
    # 12,031 requests; means 12035 and 343
    "mooncake": Workload(
        Percentiles(
            (891, 894, 901, 964, 1662, 3263, 4993, 6909, 9570, 13196, 17869, 27367, 39550, 85400, 121301, 126195)
        ),
        Percentiles((1, 3, 10, 24, 100, 213, 291, 350, 399, 447, 504, 597, 698, 1119, 2000, 2000)),
        "Mooncake (Kimi), FAST 25 release, conversation_trace",
        SEEN,
        MEASURED,
    ),
    "burstgpt": Workload(
        Zipf(1.1, 1023),
        Zipf(1.1, 1023),
        "BurstGPT (Wang et al., arXiv 2401.17644), the defaults of its load generator",
        SEEN,
        "exact",
        0.5,
    ),
    "long-tail": Workload(
        fixed(128), Exponential(256, 1024), "where a batch that leaves together loses most", OURS, "exact"
    ),
}


def named(name: str) -> Workload:
    """A published workload; ValueError for an unknown name."""
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}{nearest(name, set(WORKLOADS))}; known: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
