"""`flover bench serve`: an open loop of requests to any OpenAI endpoint, vLLM's flags, block and JSON.

Prompts are random tokens, or texts of a file. A completion gets ids, a chat the text of them: made by the server's own
/detokenize, or by a tokenizer that is named. Texts are sent as they are.
"""

from __future__ import annotations

import datetime
import math
import os
import resource
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flover.bench.keep import check_output, provenance, write_json
from flover.bench.records import Job, Record, Run
from flover.bench.results import (
    LATENCIES,
    block,
    measure,
    over_repeats,
    parse_goals,
    run_json,
)
from flover.cli.bench import Load
from flover.cli.bench_load import Source, make_source
from flover.cli.bench_run import bar

if TYPE_CHECKING:
    from flover.bench.client import Endpoint, Prompt
    from flover.tokenizer import Tokenizer

VOCAB_SIZE = 1000  # ids drawn from: the server's vocabulary is not known, but any has as many
FIRST_ID = 16  # below are the special tokens of most vocabularies
WARM = 0.1  # share of the prompt tokens that a prefix cache may have had, before it is said
PATIENCE = 0.1  # share of the median TTFT that the client may be late by, before it says so


@dataclass(frozen=True, slots=True)
class ServeBench:
    """Options that are no workload."""

    base_url: str
    endpoint: str | None
    backend: str
    model: str | None
    tokenizer: str | None
    max_concurrency: int | None
    ignore_eos: bool
    goodput: Sequence[str]
    percentile_metrics: str
    metric_percentiles: str
    seed: int
    num_warmups: int
    ready_check_timeout_sec: float
    extra_body: str
    save_detailed: bool

    def extra(self) -> dict[str, Any]:
        """More of every request's body; ValueError for anything but a JSON object."""
        try:
            return msgspec.json.decode(self.extra_body, type=dict[str, Any])
        except ValueError:
            raise ValueError(f"--extra-body must be a JSON object, got {self.extra_body[:60]!r}") from None

    def metrics(self) -> list[str]:
        """Those to print; ValueError for an unknown one."""
        names = [name.strip() for name in self.percentile_metrics.split(",") if name.strip()]
        for name in names:
            if name not in LATENCIES:
                raise ValueError(f"--percentile-metrics knows {', '.join(LATENCIES)}, got {name!r}")
        return names

    def percentiles(self) -> list[float]:
        """ValueError for anything that is none."""
        try:
            found = [float(text) for text in self.metric_percentiles.split(",")]
        except ValueError:
            found = [math.nan]
        if not all(0 < percent <= 100 for percent in found):
            raise ValueError(f"--metric-percentiles must be in (0, 100], got {self.metric_percentiles!r}")
        return found


def run_serve_bench(bench: ServeBench, load: Load, path: Path | None) -> int:
    """`path`: of the JSON, or the folder for it, or None. -> 1 if a request failed for anything but load.

    Raises:
        ValueError: an impossible option, a server that does not answer, or refuses the first request.
    """
    if find_spec("aiohttp") is None:
        raise ValueError('bench serve needs aiohttp: pip install -e ".[bench]"')
    from flover.bench.client import drive

    goals, metrics, percentiles = parse_goals(bench.goodput), bench.metrics(), bench.percentiles()
    check_output(path / "a.json" if path is not None and path.is_dir() else path, "--save-result")
    endpoint, limit = _endpoint(bench)
    tokenizer = _tokenizer(bench.tokenizer)
    source = make_source(load, VOCAB_SIZE, limit)
    given = (max(line.prompt) + 1 for line in source.trace or () if line.prompt)  # ids that the server must have
    source = replace(source, vocab_size=max([VOCAB_SIZE, *given]))
    jobs = source.jobs(bench.seed)
    prompts = _prompts(bench, endpoint, tokenizer, jobs)
    print(f"workload: {source.text}, seed {bench.seed}\nserver: {endpoint.url}, model {endpoint.model}", flush=True)
    _raise_file_limit()
    _warm_up(bench, endpoint, tokenizer, source)
    with bar("requests", jobs) as watch:
        run = Run(endpoint.kind, drive(endpoint, jobs, prompts, bench.max_concurrency, watch))
    numbers = measure(run, goals, percentiles)
    settings = {"max_concurrency": bench.max_concurrency, "request_rate": load.request_rate}
    known = {name: float(value) for name, value in settings.items() if value is not None and math.isfinite(value)}
    print(block(over_repeats([{**numbers, **known}]), metrics=metrics))
    if numbers["p99_late_ms"] > max(PATIENCE * numbers["median_ttft_ms"], 5):
        print("the client was late: its load is less even than asked for; give it a core of its own", file=sys.stderr)
    cached = sum(r.num_cached for r in run.records) / max(sum(r.num_prompt for r in run.records), 1)
    if cached > WARM:
        why = "as after a run of the same prompts; other random ones need another --seed"
        print(f"the server had {cached:.0%} of the prompt tokens in its prefix cache, {why}", file=sys.stderr)
    if path is not None:
        _save(path, bench, endpoint, load, source, run, {**numbers, **settings})
    bad = [record.error for record in run.records if record.error and record.status not in (429, 503)]
    for error in sorted(set(bad))[:3]:
        print(f"failed ({bad.count(error)} requests): {error}", file=sys.stderr)
    return int(bool(bad))


def _endpoint(bench: ServeBench) -> tuple[Endpoint, int]:
    """-> where to send, and the longest prompt and output together that it takes."""
    from flover.bench.client import PATHS, Endpoint, first_model

    parts = urllib.parse.urlsplit(bench.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--base-url must be such as http://127.0.0.1:8000, got {bench.base_url!r}")
    if bench.backend not in PATHS:
        raise ValueError(f"--backend must be {' or '.join(PATHS)}, got {bench.backend!r}")
    extra = bench.extra()
    base, key = _base(bench), os.environ.get("OPENAI_API_KEY", "")
    card: dict[str, Any] = {"id": bench.model} if bench.model else {}
    try:
        found = first_model(base, key, bench.ready_check_timeout_sec)
        card = {**found, "id": bench.model or found["id"]}
    except ValueError:
        if not card:
            raise
    url = base + (bench.endpoint or PATHS[bench.backend])
    limit = card.get("max_model_len")
    endpoint = Endpoint(url, card["id"], bench.backend, bench.ignore_eos, key, extra=extra)
    return endpoint, limit if isinstance(limit, int) else 1 << 30


def _base(bench: ServeBench) -> str:
    return bench.base_url.rstrip("/").removesuffix("/v1")


def _tokenizer(name: str | None) -> Tokenizer | None:
    if name is None:
        return None
    from flover.models.loader import resolve_model
    from flover.tokenizer import Tokenizer

    found = Tokenizer.from_folder(resolve_model(name))
    if found is None:
        raise ValueError(f"--tokenizer {name}: no tokenizer.json there")
    return found


def _prompts(bench: ServeBench, endpoint: Endpoint, tokenizer: Tokenizer | None, jobs: Sequence[Job]) -> list[Prompt]:
    if endpoint.kind != "openai-chat":
        return [job.text or job.prompt for job in jobs]
    if tokenizer is not None:
        return [job.text or tokenizer.decode(list(job.prompt), True) for job in jobs]
    return [job.text or _detokenize(f"{_base(bench)}/detokenize", endpoint, job.prompt) for job in jobs]


def _detokenize(url: str, endpoint: Endpoint, ids: Sequence[int]) -> str:
    tokens = [max(token, FIRST_ID) for token in ids]
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {endpoint.key}"}
    body = msgspec.json.encode({"model": endpoint.model, "tokens": tokens})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as response:
            return str(msgspec.json.decode(response.read())["prompt"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{url} makes no text of tokens ({text}): name a --tokenizer") from None


def _warm_up(bench: ServeBench, endpoint: Endpoint, tokenizer: Tokenizer | None, source: Source) -> None:
    """Before the clock runs: one request in any case, to see that it works."""
    from flover.bench.client import drive

    jobs = list(islice(cycle(source.warm_up(bench.seed)), max(bench.num_warmups, 1)))
    patient = replace(endpoint, timeout=60.0)
    (record, *_) = drive(patient, jobs, _prompts(bench, endpoint, tokenizer, jobs), bench.max_concurrency)
    if record.error is not None:
        raise ValueError(f"the first request to {endpoint.url} failed: {record.error}")


def _raise_file_limit() -> None:
    """A request in flight is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else max(soft, 65536), hard))


def _save(
    path: Path, bench: ServeBench, endpoint: Endpoint, load: Load, source: Source, run: Run, numbers: dict[str, Any]
) -> None:
    """Flat, with the keys of vLLM's bench; and every request."""
    now = datetime.datetime.now()
    if path.is_dir():
        rate = "inf" if load.request_rate is None else f"{load.request_rate:g}"
        if load.ramp_up_strategy is not None:
            rate = f"ramp-up-{load.ramp_up_strategy}-{load.ramp_up_start_rps:g}qps-{load.ramp_up_end_rps:g}"
        most = f"-concurrency{bench.max_concurrency}" if bench.max_concurrency else ""
        model = endpoint.model.rstrip("/").rpartition("/")[2]
        path = path / f"{endpoint.kind}-{rate}qps{most}-{model}-{now:%Y%m%d-%H%M%S}.json"
    head = {
        "date": f"{now:%Y%m%d-%H%M%S}",
        "backend": endpoint.kind,
        "model_id": endpoint.model,
        "num_prompts": len(run.records),
        "burstiness": load.burstiness,
        "goodput": list(bench.goodput),
        "environment": provenance(None),
        "workload": {"text": source.text, **asdict(load)},
    }
    if bench.save_detailed:
        head |= _lists(run.records)
    kept = run_json(run, {}, bench.seed)
    for entry, record in zip(kept["requests"], run.records):
        entry |= {"sent": record.sent, "ended": record.ended, "status": record.status, "num_cached": record.num_cached}
    write_json(path, {**head, **numbers, **kept})
    print(f"written: {path}", file=sys.stderr)


def _lists(records: Sequence[Record]) -> dict[str, Any]:
    """vLLM's details: an entry a request, seconds. A request without a token has a TTFT of 0 there."""
    return {
        "input_lens": [r.num_prompt for r in records],
        "output_lens": [len(r.times) for r in records],
        "ttfts": [r.ttft if r.times else 0.0 for r in records],
        "itls": [[b - a for a, b in pairwise(r.times) if b > a] for r in records],
        "start_times": [r.sent for r in records],
        "errors": [r.error or "" for r in records],
    }
