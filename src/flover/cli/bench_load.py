"""From the options of `flover bench` to jobs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from flover.bench.records import Job
from flover.bench.traces import (
    CUSTOM_LINE,
    SEEN,
    WORKLOADS,
    TraceLine,
    named,
    read_custom,
    read_trace,
    trace_jobs,
)
from flover.bench.workload import (
    ARRIVALS,
    MOST_TOKENS,
    Arrivals,
    Gamma,
    Interval,
    Lengths,
    Lognormal,
    Ramp,
    Uniform,
    draw_lengths,
    make_jobs,
    stream,
)
from flover.cli.bench import Load

T = TypeVar("T")
NUM_PROMPTS = 32
WARM_OUTPUT = 8  # tokens at most of a warm-up request
WARM_PROMPTS = 256  # warm-up requests at most
WARM_TEXT = "Hello"  # their prompt where no token ids are drawn
CUSTOM_OUTPUT = 256  # tokens where a custom line says nothing, as in vLLM
ELSEWHERE = ("hf", "prefix_repetition", "sonnet")  # data sets of vLLM's bench


@dataclass(frozen=True, slots=True)
class Source:
    """Makes the jobs of a seed; `text` says which. Every check that needs no seed has been made."""

    text: str
    count: int
    arrivals: Arrivals | None  # None: the trace's own
    lengths: tuple[Lengths, Lengths] | None
    trace: list[TraceLine] | None
    vocab_size: int
    max_model_len: int
    shrink: bool
    texts: Sequence[tuple[str, int]] | None = None  # prompts and output tokens, instead of lengths

    def jobs(self, seed: int) -> list[Job]:
        """Those of this seed; ValueError if one does not fit (of texts only the server can say)."""
        if self.texts is not None:
            assert self.arrivals is not None
            times = self.arrivals.draw(self.count, stream(seed, ARRIVALS)).tolist()
            return [Job(time, (), m, text) for time, (text, m) in zip(times, self.texts)]
        if self.lengths is None:
            lines = self.trace or []
            return trace_jobs(lines, self.vocab_size, seed, self.max_model_len, self.arrivals, self.shrink)
        assert self.arrivals is not None
        prompt, output = self.lengths
        return make_jobs(
            self.arrivals, prompt, output, self.count, self.vocab_size, seed, self.max_model_len, self.shrink
        )

    def warm_up(self, seed: int) -> list[Job]:
        """As many rows and such prompts, few output tokens, at once; prompts that no measured request has."""
        lines = None if self.trace is None else [replace(line, prompt=None) for line in self.trace]
        texts = None if self.texts is None else [(WARM_TEXT, m) for _, m in self.texts]
        jobs = replace(self, arrivals=Interval(0), trace=lines, texts=texts).jobs(seed + (1 << 32))
        return [job._replace(num_output=min(job.num_output, WARM_OUTPUT)) for job in jobs[:WARM_PROMPTS]]

    def num_shrunk(self, seed: int) -> int:
        """Requests that had to be shortened."""
        if self.trace is not None:
            pairs = [(line.num_prompt, line.num_output) for line in self.trace]
        else:
            assert self.lengths is not None
            pairs = draw_lengths(*self.lengths, self.count, seed)
        return sum(n + m > self.max_model_len for n, m in pairs)


def make_source(load: Load, vocab_size: int, max_model_len: int) -> Source:
    """Check a load.

    Raises:
        ValueError: an unknown data set, options that exclude each other, an impossible number, a bad trace.
    """
    if load.num_prompts is not None and load.num_prompts < 1:
        raise ValueError(f"--num-prompts must be at least 1, got {load.num_prompts}")
    if load.ramp_up_strategy is None and (load.ramp_up_start_rps, load.ramp_up_end_rps) != (None, None):
        raise ValueError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy linear or exponential")
    rates = load.request_rate, load.request_interval, load.ramp_up_strategy
    if load.burstiness is not None and rates == (None, None, None):
        needs = "needs --request-rate or --ramp-up-strategy: it says how arrivals vary around it"
        raise ValueError(f"--burstiness {load.burstiness:g} {needs}")
    if load.dataset_name in ELSEWHERE:
        instead = f"--dataset-name custom sends the prompts of a JSON lines file of {CUSTOM_LINE}"
        raise ValueError(f"--dataset-name {load.dataset_name} is not here: {instead}")
    if load.dataset_name == "custom":
        return _custom(load, vocab_size, max_model_len)
    if load.dataset_path is not None and load.dataset_name not in ("trace", "random"):
        raise ValueError(f"--dataset-path goes with --dataset-name trace or custom, got {load.dataset_name}")
    if load.dataset_path is not None or load.dataset_name == "trace":
        return _trace(load, vocab_size, max_model_len)
    if load.dataset_name == "random":
        burstiness = 1.0
        inputs, outputs = (_law(load.input_len, load, "input"), _law(load.output_len, load, "output"))
        lengths: tuple[Lengths, Lengths] = (inputs, outputs)
        text = f"random, {_range(inputs, load.input_len)} prompt and {_range(outputs, load.output_len)} output tokens"
        shrink = any(isinstance(law, Lognormal) for law in lengths)  # of the others the longest is known
    else:
        try:
            published = named(load.dataset_name)
        except ValueError as error:
            raise ValueError(f"--dataset-name: {error}; or random, trace, custom") from None
        burstiness, lengths, shrink = published.burstiness, (published.prompt, published.output), True
        text = f"{load.dataset_name} ({published.source}; {published.mark})"
    law, when = _arrivals(load, burstiness)
    count = load.num_prompts or NUM_PROMPTS
    return Source(f"{text}, {count} requests, {when}", count, law, lengths, None, vocab_size, max_model_len, shrink)


def _trace(load: Load, vocab_size: int, max_model_len: int) -> Source:
    if load.dataset_path is None:
        raise ValueError("--dataset-name trace needs --dataset-path, a JSON lines file")
    lines = _first(read_trace(Path(load.dataset_path)), load)
    own = load.request_rate is None and load.request_interval is None and load.ramp_up_strategy is None
    law, when = (None, "arriving as in the trace") if own else _arrivals(load, 1.0)
    text = f"{load.dataset_path}, {len(lines)} requests, {when}"
    return Source(text, len(lines), law, None, lines, vocab_size, max_model_len, True)


def _custom(load: Load, vocab_size: int, max_model_len: int) -> Source:
    if load.dataset_path is None:
        raise ValueError(f"--dataset-name custom needs --dataset-path, a JSON lines file of {CUSTOM_LINE}")
    given = None if load.custom_output_len == -1 else load.custom_output_len
    if given is not None and given < 1:
        raise ValueError(f"--custom-output-len must be at least 1, or -1: each line's output_tokens, got {given}")
    lines = _first(read_custom(Path(load.dataset_path)), load)
    texts = [(text, given or m or CUSTOM_OUTPUT) for text, m in lines]
    law, when = _arrivals(load, 1.0)
    text = f"{load.dataset_path}, {len(texts)} prompts, {when}"
    return Source(text, len(texts), law, None, None, vocab_size, max_model_len, False, texts)


def _first(lines: list[T], load: Load) -> list[T]:
    """As many as are asked for, in the order of the file."""
    if load.num_prompts is not None and load.num_prompts > len(lines):
        raise ValueError(f"--num-prompts is {load.num_prompts}, {load.dataset_path} holds {len(lines)} requests")
    return lines[: load.num_prompts]


def _law(text: str, load: Load, which: str) -> Uniform | Lognormal:
    """Of lengths: "128", with the range ratio; "uniform:LO:HI"; "lognormal:MEAN:P95"."""
    ratio = load.range_ratio
    if not 0 <= ratio < 1:
        raise ValueError(f"--random-range-ratio must be at least 0 and below 1, got {ratio}")
    match = re.fullmatch(r"(\d+)|(uniform|lognormal):(\d+):(\d+)", text)
    length, name, *pair = match.groups() if match else (None, None)
    numbers = [int(number) for number in (length, *pair) if number]
    if not numbers or not all(1 <= number <= MOST_TOKENS for number in numbers):
        laws = "128, uniform:32:1024 or lognormal:200:700 (mean and 95th percentile)"
        raise ValueError(f"--{which}-len must be tokens (1 to {MOST_TOKENS}) such as {laws}, got {text!r}")
    if name is None:
        return Uniform(max(round(numbers[0] * (1 - ratio)), 1), round(numbers[0] * (1 + ratio)))
    if ratio:
        raise ValueError(f"--random-range-ratio goes with lengths such as 128, got --{which}-len {text}")
    try:
        return Uniform(*numbers) if name == "uniform" else Lognormal.of(*numbers)
    except ValueError as error:
        raise ValueError(f"--{which}-len {text}: {error}") from None


def _range(law: Uniform | Lognormal, text: str) -> str:
    if isinstance(law, Lognormal):
        return text
    return f"{law.lo}" if law.lo == law.hi else f"{law.lo}-{law.hi}"


def _arrivals(load: Load, burstiness: float) -> tuple[Arrivals, str]:
    if load.ramp_up_strategy is not None:
        return _ramp(load.ramp_up_strategy, load, burstiness)
    if load.request_interval is not None:
        if load.request_rate is not None or load.burstiness is not None:
            raise ValueError("--request-interval excludes --request-rate and --burstiness")
        return Interval(load.request_interval), f"one every {load.request_interval:g} s"
    rate = math.inf if load.request_rate is None else load.request_rate
    law = Gamma(rate, burstiness if load.burstiness is None else load.burstiness, rescale=True)
    if math.isinf(rate):
        return law, "all at once"
    kind = "Poisson" if law.burstiness == 1 else f"gamma, burstiness {law.burstiness:g}"
    return law, f"{rate:g} a second ({kind})"


def _ramp(strategy: str, load: Load, burstiness: float) -> tuple[Arrivals, str]:
    if load.request_rate is not None or load.request_interval is not None:
        raise ValueError("--ramp-up-strategy excludes --request-rate and --request-interval")
    if load.ramp_up_start_rps is None or load.ramp_up_end_rps is None:
        raise ValueError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
    shape = burstiness if load.burstiness is None else load.burstiness
    law = Ramp(load.ramp_up_start_rps, load.ramp_up_end_rps, strategy, shape)
    return law, f"{law.start:g} to {law.end:g} a second ({law.strategy}, burstiness {law.burstiness:g})"


def print_workloads() -> int:
    """The table of published workloads."""
    table = Table("name", "source", "shape", "burstiness", box=None, pad_edge=False)
    for name, each in WORKLOADS.items():
        mark = "" if each.mark == SEEN else f" [{each.mark}]"
        table.add_row(name, f"{each.source}{mark}", each.shape, f"{each.burstiness:g}")
    Console(highlight=False, markup=False).print(table)
    return 0
