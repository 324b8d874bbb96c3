"""Command line options made from the fields of dataclasses such as `EngineConfig`: one source of names and defaults.

An option that is not given is not passed on, so the defaults stay those of the dataclasses (and of the checkpoint).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

from flover.config import CHOICES, EngineConfig
from flover.sampling_params import SamplingParams

TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "tuple[str, ...]": list[str],
    "Sequence[int]": list[int],
    "Sequence[str]": list[str],
    "str | Sequence[str]": list[str],
    "Mapping[int, float]": list[str],
}
PANELS = {"SamplingParams": "Sampling", "EngineConfig": "Engine", "Load": "Workload"}
SKIPPED = {"record_timeline", "structured_outputs"}  # --timeline sets the first; the second is for --input
SKIPPED_SAMPLING = {"seed"}  # --seed is the engine's: it covers every prompt that brings none
SPELLINGS = {
    "model": ("--model", "-m"),
    "served_model_names": ("--served-model-name",),
    "max_tokens": ("--max-tokens", "-n"),
    "tensor_parallel_size": ("--tensor-parallel-size", "-tp", "--tp"),
    "pipeline_parallel_size": ("--pipeline-parallel-size", "-pp", "--pp"),
    "generation_config": ("--generation-config", "--sampling-defaults"),
    "input_len": ("--input-len", "--random-input-len"),
    "output_len": ("--output-len", "--random-output-len"),
    "range_ratio": ("--random-range-ratio",),
}
HELP = {
    "n": "choices per prompt; -n is --max-tokens",
    "temperature": "0 is greedy",
    "top_k": "keep the k best tokens; 0 is all",
    "top_p": "keep the best tokens up to this probability",
    "min_p": "keep tokens of at least this share of the best one's probability",
    "logit_bias": "ID=VALUE, added to a token's logit; may be repeated",
    "bad_words": "may not be generated; may be repeated",
    "allowed_token_ids": "only these ids; may be repeated",
    "min_tokens": "no end before that many tokens",
    "max_tokens": "output limit in tokens (default: 128, in a chat the context); --n is choices",
    "stop": "a string that ends the text; may be repeated",
    "stop_token_ids": "ids that end the text; may be repeated",
    "ignore_eos": "go on after the end-of-sequence token",
    "logprobs": "log-probabilities of the best tokens, with --output",
    "prompt_logprobs": "the same for the prompt",
    "priority": "lower runs first under --order priority",
    "model": "built-in name, checkpoint folder or Hugging Face hub id",
    "dtype": "of weights and activations; auto: float32 on a CPU, else the checkpoint's",
    "kv_cache_dtype": "of the KV cache; auto: as dtype; fp8: e4m3 without scales, half the memory of 16 bits",
    "max_model_len": "prompt + output limit in tokens",
    "max_num_seqs": "rows of the running batch",
    "max_num_batched_tokens": "token budget of a step",
    "reorder": "of the slab",
    "block_size": "tokens per KV block",
    "num_kv_blocks": "size of the paged KV cache in blocks",
    "kv_cache_memory_bytes": "size of the KV cache in bytes",
    "gpu_memory_utilization": "share of the free GPU memory to take",
    "enable_prefix_caching": "reuse the KV of prompts that begin alike",
    "batch_invariant": "every logit bit-equal alone and fused, at a price",
    "seed": "of prompts that bring none",
    "order": "who is admitted first (default fcfs, of a server fair)",
    "itl_budget": "milliseconds that a step with decode rows may take",
    "prefill_mode": "prefill shares steps with decode, alternates with it, or runs beside it",
    "overlap_depth": "plans made ahead: 0 or 1",
    "generation_config": "auto: the checkpoint's sampling defaults; none: not",
    "load_format": "dummy: random weights",
    "quantization": "of linear layers while loading: weights of 8 bits, with _w8a8 tokens too",
    "tensor_parallel_size": "ranks that compute the model together: GPUs, or processes on a CPU",
    "pipeline_parallel_size": "stages of layers, each of tensor_parallel_size ranks",
    "num_threads": "CPU threads",
    "debug_poison": "fill freed KV with NaN",
    "host": "0.0.0.0 is every interface",
    "port": "0 is any free one",
    "served_model_names": "as clients call it; may be repeated",
    "allowed_origins": "pages that may call from a browser; * is all; may be repeated",
    "allowed_methods": "of those pages",
    "allowed_headers": "of those pages",
    "max_queued_requests": "that may wait; more is a 429",
    "max_queued_tokens": "prompt tokens that may wait; more is a 429",
    "max_body_bytes": "of a request; more is a 413",
    "body_timeout": "seconds for a request to arrive",
    "queue_timeout": "seconds to the first token; more is a 503",
    "request_timeout": "seconds to the last token; more is a 504",
    "drain_timeout": "seconds that requests have to finish after SIGTERM",
    "metrics_compat": "prefix of the metrics: flover or vllm",
    "log_requests": "a line of JSON at the end of each",
    "log_prompts": "with its prompt",
    "otlp_traces_endpoint": "URL that gets a span of each request",
    "admin_socket": "path of `flover admin`'s socket, or none",
    "max_restarts": "of a dying engine or front, in a row",
    "engine_iteration_timeout": "seconds without a step until a restart",
    "tool_call_parser": "hermes, llama3_json or mistral; else the template's",
    "num_prompts": "requests (default: 32, or all of a file)",
    "dataset_name": "random, trace, custom, or the lengths of a published one: see `flover bench workloads`",
    "dataset_path": "JSON lines; a trace: arrival, num_prompt or prompt_token_ids, num_output;"
    " custom (bench serve only): prompt, output_tokens",
    "custom_output_len": "output tokens of each custom prompt (default, and -1: its output_tokens, or else 256)",
    "input_len": "prompt tokens of random requests: 128, uniform:LO:HI, or lognormal:MEAN:P95",
    "output_len": "output tokens of random requests, likewise",
    "range_ratio": "r: random lengths are uniform in len * (1 - r) to len * (1 + r)",
    "request_rate": "requests/s; inf: all at once (default: inf, or as the trace has it)",
    "request_interval": "seconds from one request to the next, instead of a rate",
    "ramp_up_strategy": "linear or exponential: the rate goes from start to end, instead of a constant one",
    "ramp_up_start_rps": "requests/s at the first request",
    "ramp_up_end_rps": "requests/s at the last request",
    "burstiness": "shape of the gamma law of arrivals; 1 is Poisson, less is burstier (default: the workload's)",
}


def with_options(*without: str, **groups: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`@with_options(sampling=SamplingParams, engine=EngineConfig)`: it gets a dict of the given fields each.

    Args:
        without: fields that are no options. groups: dataclasses, by the parameter that takes their fields.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name not in groups]
        members = {group: [f for f in _fields(cls) if f.name not in without] for group, cls in groups.items()}
        names = {group: [f.name for f in each] for group, each in members.items()}
        options = [_option(field, groups[group]) for group, each in members.items() for field in each]

        @functools.wraps(function)
        def wrapper(**given: Any) -> Any:
            for group, each in names.items():
                values = {name: given.pop(name) for name in each}
                given[group] = _clean({k: v for k, v in values.items() if v is not None and v != []})
            return function(**given)

        parameters = own + options
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def with_model(name: str | None, engine: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's options with the model that was given as an argument; ValueError if --model was given too."""
    if name is None:
        return dict(engine)
    if "model" in engine:
        raise ValueError(f"give the model once, got {name!r} and --model {engine['model']!r}")
    return {"model": name, **engine}


def _fields(cls: type) -> list[Field[Any]]:
    skipped = SKIPPED | (SKIPPED_SAMPLING if cls is SamplingParams else set())
    return [f for f in fields(cls) if f.name not in skipped]


def _option(field: Field[Any], cls: type) -> inspect.Parameter:
    name = field.name
    kind = TYPES[str(field.type).removesuffix(" | None")]
    choices = CHOICES.get(name) if cls is EngineConfig else None
    default = None if field.default in (None, (), "", MISSING) else field.default
    default = " ".join(default) if isinstance(default, tuple) else default
    note = HELP.get(name, "")
    dashed = name.replace("_", "-")
    spellings = (f"--{dashed}/--no-{dashed}",) if kind is bool else SPELLINGS.get(name, (f"--{dashed}",))
    option = typer.Option(
        *spellings,
        help=f"{note} (default {default})".strip() if default is not None and "(default" not in note else note,
        show_default=False,
        metavar="|".join(choices) if choices else None,
        rich_help_panel=PANELS.get(cls.__name__),
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _clean(values: Mapping[str, Any]) -> dict[str, Any]:
    """logit_bias from ID=VALUE; SGLang's words for the sampling defaults."""
    values = dict(values)
    if "logit_bias" in values:
        values["logit_bias"] = dict(_bias(entry) for entry in values["logit_bias"])
    if "generation_config" in values:
        words = {"model": "auto", "openai": "none", "vllm": "none"}
        values["generation_config"] = words.get(values["generation_config"], values["generation_config"])
    return values


def _bias(entry: str) -> tuple[int, float]:
    token, _, value = entry.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise ValueError(f"logit_bias must be ID=VALUE, got {entry!r}") from None
