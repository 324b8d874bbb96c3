"""The systems that serve a workload, by name. Those of this engine share model and kernels: only scheduling differs.

| name | who runs together |
|---|---|
| serial | nobody: one request at a time to its end, in order of arrival |
| fused | everyone in flight; with the cache as configured, or `:paged`, or a slab: `:off`, `:move`, `:indirect` |
| fused:MODE:tpN | the same on N tensor-parallel ranks |
| dynamic, dynamic:50ms, dynamic:2s | a batch that joins and leaves together (`batcher`); no unit: seconds; none: 0 |
| dynamic:50ms:4,8 | the same; batches of these sizes do not wait (Triton's preferred_batch_size) |
| concurrent, concurrent:N | N instances around the same weights, each one request at a time (`instances`) |
| concurrent-processes, concurrent-processes:N | N processes with weights of their own, likewise (`processes`) |
| transformers, transformers:batch | Hugging Face: `generate`, one at a time; its continuous batching (`outside`) |
| openai:URL | any server with /v1/completions (`outside`) |

No torch here: a system's own imports happen when it is made.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from flover.bench.records import Run, System
from flover.config import EngineConfig
from flover.show import nearest

NAMES = (
    "serial",
    "fused",
    "fused:off",
    "fused:move",
    "fused:indirect",
    "fused:paged",
    "fused:MODE:tpN",
    "dynamic",
    "dynamic:DELAY",
    "dynamic:DELAY:SIZES",
    "concurrent",
    "concurrent:N",
    "concurrent-processes",
    "concurrent-processes:N",
    "transformers",
    "transformers:batch",
    "openai:URL",
)
OUTSIDE = ("transformers", "transformers:batch", "openai")
RANKS = re.compile(r":tp([1-9][0-9]{0,2})$")
OPTIONS = {"dynamic": ("stream", "max_batch"), "openai": ("model",)}
UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0}


class SystemMissing(ValueError):  # noqa: N818  a gap in a table rather than a mistake of the user's
    """An outside system that is not here: a package that is not installed, a server that does not answer."""


def make_system(name: str, config: EngineConfig, **options: Any) -> System:
    """Load a system, ready to run.

    Args:
        name: see the module.
        config: of the engine. What a system is defined by (policy, rows, layout) it sets itself.
        options: OPTIONS; see `engines.DynamicSystem`, `outside.OpenAISystem`.

    Raises:
        SystemMissing: an outside system that is not here.
        ValueError: an unknown name or option, or anything wrong with settings, checkpoint or memory; one line.
    """
    check_name(name)
    kind, _, detail = name.partition(":")
    known = OPTIONS.get(kind, ())
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}" + (f"; it has {', '.join(known)}" if known else ""))
    if kind == "openai":
        from flover.bench.outside import OpenAISystem

        return OpenAISystem(name, detail, **options)
    if kind in ("transformers", "concurrent", "concurrent-processes") and config.num_ranks > 1:
        tp, pp = config.tensor_parallel_size, config.pipeline_parallel_size
        raise ValueError(f"{name} has no ranks, got tensor_parallel_size={tp}, pipeline_parallel_size={pp}")
    if kind == "transformers":
        for option in ("quantization", "kv_cache_dtype"):
            if (value := getattr(config, option)) not in ("none", "auto"):
                raise ValueError(f"{name} has no {option}={value!r} of ours: it would compute something else")
        from flover.bench.outside import TransformersBatchSystem, TransformersSystem

        return (TransformersBatchSystem if detail else TransformersSystem)(name, config)
    if kind == "concurrent":
        from flover.bench.instances import ConcurrentSystem

        return ConcurrentSystem(name, config, parse_count(name, detail) if detail else None)
    if kind == "concurrent-processes":
        from flover.bench.processes import ProcessesSystem

        return ProcessesSystem(name, config, parse_count(name, detail) if detail else None)
    from flover.bench.engines import DynamicSystem, EngineSystem

    if kind == "dynamic":
        return DynamicSystem(name, config, *parse_dynamic(detail), **options)
    if kind == "serial":
        return EngineSystem(name, replace(config, policy="serial", max_num_seqs=1))
    return EngineSystem(name, _fused(name, config))


def _fused(name: str, config: EngineConfig) -> EngineConfig:
    """As the mode of the cache and the number of ranks in a name want it."""
    if (ranks := RANKS.search(name)) is not None:
        config = replace(config, tensor_parallel_size=int(ranks[1]))
    mode = RANKS.sub("", name).partition(":")[2]
    if mode == "paged":
        config = replace(config, kv_layout="paged")
    elif mode:
        config = replace(config, kv_layout="slab", reorder=mode, num_kv_blocks=None)
    return replace(config, policy="fused")


def split_names(text: str) -> list[str]:
    """The names of a list with commas, each once. A bare number is a size of the name before it: no system is one."""
    return list(dict.fromkeys(filter(None, re.split(r",(?!\d+(?:,|$))", "".join(text.split())))))


def check_name(name: str) -> None:
    """ValueError if `make_system` would not know the name; loads nothing."""
    kind, _, detail = name.partition(":")
    if kind == "dynamic" and detail:
        parse_dynamic(detail)
    elif kind in ("concurrent", "concurrent-processes") and detail:
        parse_count(name, detail)
    elif kind == "openai":
        if not detail.startswith(("http://", "https://")):
            raise ValueError(f"{name!r} needs a URL such as openai:http://localhost:8000")
    elif kind == "fused" and RANKS.search(name):
        check_name(RANKS.sub("", name))
    elif name not in NAMES or name == "fused:MODE:tpN":
        raise ValueError(f"unknown system {name!r}{nearest(name, set(NAMES))}; known: {', '.join(NAMES)}")


def parse_dynamic(detail: str) -> tuple[float, tuple[int, ...]]:
    """Seconds of delay and preferred sizes of "50ms", "2s", "2", "50ms:4,8" or "": none."""
    if not detail:
        return 0.0, ()
    delay, colon, sizes = detail.partition(":")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|)", delay)
    if match is None:
        raise ValueError(f"'dynamic:{detail}' needs a delay such as 50ms or 2s")
    seconds = float(match[1]) * UNITS[match[2]]
    if colon and not (seconds and re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", sizes)):
        raise ValueError(f"'dynamic:{detail}' needs a delay over 0 and sizes from 1 to 9999, such as dynamic:50ms:4,8")
    return seconds, tuple(map(int, sizes.split(","))) if colon else ()


def parse_count(name: str, text: str) -> int:
    """The N of a name such as concurrent:N."""
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise ValueError(f"{name!r} needs a number of instances from 1 to 9999")
    return int(text)


def same_tokens(run: Run, reference: Run) -> tuple[float, int | None]:
    """Share of requests with the same tokens in both runs, and the first output position where any other parts.

    Raises:
        ValueError: the runs are not of the same number of jobs.
    """
    if len(run.records) != len(reference.records):
        raise ValueError(f"{len(run.records)} records cannot be compared with {len(reference.records)}")
    parts: list[int] = []
    for ours, theirs in zip(run.records, reference.records):
        if ours.token_ids != theirs.token_ids:
            pairs = zip(ours.token_ids, theirs.token_ids)
            shorter = min(len(ours.token_ids), len(theirs.token_ids))
            parts.append(next((i for i, (a, b) in enumerate(pairs) if a != b), shorter))
    return 1 - len(parts) / max(len(run.records), 1), min(parts, default=None)
