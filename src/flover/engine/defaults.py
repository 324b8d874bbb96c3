"""What `LLM` and `AsyncLLM` share: their options, and what a checkpoint decides about a request that says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from flover.config import EngineConfig
from flover.engine.inputs import check_length
from flover.engine.llm_engine import LLMEngine
from flover.model_config import generation_defaults
from flover.sampling_params import SamplingParams
from flover.show import nearest

Conversation = Sequence[Mapping[str, Any]]
# generation_config.json -> SamplingParams, as vLLM reads it
GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def engine_config(model: str | None, options: Mapping[str, Any]) -> EngineConfig:
    """The settings of `LLM(model, **options)`, where None is an option's default.

    Raises:
        ValueError: an unknown option; names the nearest known one.
    """
    known = {f.name for f in fields(EngineConfig)}
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}{nearest(name, known)}")
    given = {name: value for name, value in options.items() if value is not None}
    return EngineConfig(**given) if model is None else EngineConfig(**{**given, "model": str(model)})


def default_sampling_params(engine: LLMEngine) -> SamplingParams:
    """What generation_config.json asks for, on top of the usual defaults; greedy if it says do_sample: false."""
    if engine.core.resolved.engine.generation_config == "none":
        return SamplingParams()
    given = generation_defaults(engine.folder)
    values = {ours: given[name] for name, ours in GENERATION_DEFAULTS.items() if given.get(name) is not None}
    if given.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return SamplingParams(**values)
    except ValueError as error:
        file = engine.folder / "generation_config.json"
        raise ValueError(f"{file}: {error} (generation_config='none' ignores it)") from None


def default_chat_params(engine: LLMEngine) -> SamplingParams:
    """The same, with the output limited by the context only, unless generation_config.json limits it."""
    params = default_sampling_params(engine)
    limited = params.max_tokens != SamplingParams().max_tokens
    return params if limited else replace(params, max_tokens=None)


def chat_prompt(
    engine: LLMEngine,
    messages: Conversation,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A conversation as the prompt that the model's template makes of it: "prompt" and "prompt_token_ids"."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ValueError(f"chat needs a tokenizer, and {engine.folder} has no tokenizer.json")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt, tools, chat_template_kwargs)
    check_length(text, tokenizer, engine.core.resolved.scheduler.max_model_len)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
