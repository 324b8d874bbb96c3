"""`SamplingParams`: how a request is sampled and when it stops.

One that exists is valid on its own; what depends on the model (vocabulary, context) is checked by `engine.inputs`.
Field names and defaults follow vLLM and the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from flover.show import nearest, show
from flover.structured import StructuredOutputsParams

MAX_N = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGPROBS = 1024
MAX_TOKENS = 2**31 - 1
MAX_LIST = 65_536


def _number(name: str, value: Any, low: float, high: float) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)  # numpy's too
    if not is_number:
        raise ValueError(f"{name} must be a number, got {show(value)} ({type(value).__name__})")
    if not low <= value <= high:  # NaN fails every comparison
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {show(value)}")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer:
        raise ValueError(f"{name} must be an integer, got {show(value)} ({type(value).__name__})")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {show(value)}")
    return int(value)


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {show(value)}")


def as_list(value: Any) -> Any:
    """An array or a tensor as the list that it holds; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    value = as_list(value)
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, set, frozenset)):
        raise ValueError(f"{name} must be a list of token ids, got {show(value)}")
    if len(value) > MAX_LIST:
        raise ValueError(f"{name} holds {len(value)} ids, the limit is {MAX_LIST}")
    return tuple(_integer(f"{name} entry", v, 0, MAX_TOKENS) for v in value)


def _strings(name: str, value: Any, max_count: int = MAX_STOP_STRINGS) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a string or a list of strings, got {show(value)}")
    if len(value) > max_count:
        raise ValueError(f"{name} holds {len(value)} strings, the limit is {max_count}")
    for text in value:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} must hold non-empty strings, got {show(text)}")
        if len(text) > MAX_STOP_LENGTH:
            raise ValueError(f"{name} holds a string of {len(text)} characters, the limit is {MAX_STOP_LENGTH}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{name} holds a lone surrogate, which no text can contain: {show(text)}")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it stops. Frozen; every field is checked at construction.

    Args:
        n: choices to generate for the prompt.
        temperature: 0 is greedy; a value too small to divide by is greedy too.
        top_k: keep the k best tokens (ties kept); 0 or -1 keeps all.
        top_p: keep the smallest set of best tokens whose probability reaches top_p (ties kept).
        min_p: keep tokens with at least min_p times the best token's probability.
        repetition_penalty, presence_penalty, frequency_penalty: as in vLLM; the first counts the prompt too.
        logit_bias: token id -> value added to its logit, in [-100, 100].
        bad_words: strings that may not be generated.
        allowed_token_ids: only these may be generated.
        min_tokens: EOS and stop_token_ids are masked until this many tokens exist; stop strings wait too.
        max_tokens: output limit; None is up to the context limit.
        stop: strings that end the text; they are cut off unless include_stop_str_in_output.
        stop_token_ids: ids that end the request besides EOS; the id is kept in `token_ids`, not in the text.
        ignore_eos: go on after EOS.
        seed: 64-bit seed; None draws one from the engine's seed.
        logprobs: number of best log-probabilities of the raw logits per output token, beside the chosen one.
        prompt_logprobs: the same for the prompt's tokens.
        priority: lower runs first under order="priority".
        structured_outputs: what the text must look like: a JSON schema, a regex, ...; EOS then ends it, whatever
            ignore_eos says. Needs flover[structured].

    Raises:
        ValueError: naming the field, the value and the valid range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    allowed_token_ids: Sequence[int] | None = None
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = 0
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("n", _integer("n", self.n, 1, MAX_N))
        put("temperature", _number("temperature", self.temperature, 0.0, 1e4))
        put("top_k", _integer("top_k", self.top_k, -1, MAX_TOKENS))
        put("top_p", _number("top_p", self.top_p, 0.0, 1.0))
        if self.top_p == 0.0:
            raise ValueError("top_p must be in (0, 1], got 0")
        put("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        put("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 1e-3, 1e3))
        put("presence_penalty", _number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        self._check_lists(put)
        if self.max_tokens is not None:
            put("max_tokens", _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS))
        put("min_tokens", _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens {self.max_tokens}, got {self.min_tokens}")
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                put(name, _integer(name, getattr(self, name), 0, MAX_LOGPROBS))
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _boolean(name, getattr(self, name))
        put("priority", _integer("priority", self.priority, -(2**31), 2**31))
        if self.structured_outputs is not None:
            put("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))

    def _check_lists(self, put: Any) -> None:
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LIST:
                raise ValueError(f"logit_bias must map at most {MAX_LIST} token ids to numbers")
            put(
                "logit_bias",
                {
                    _integer(
                        "logit_bias token id",
                        int(k) if isinstance(k, str) and k.isascii() and k.isdecimal() else k,
                        0,
                        MAX_TOKENS,
                    ): _number(f"logit_bias of token {show(k)}", v, -100.0, 100.0)
                    for k, v in self.logit_bias.items()
                },
            )
        put("bad_words", _strings("bad_words", () if self.bad_words is None else self.bad_words, 1024))
        put("stop", _strings("stop", () if self.stop is None else self.stop))
        stop_ids = () if self.stop_token_ids is None else self.stop_token_ids
        put("stop_token_ids", _token_ids("stop_token_ids", stop_ids))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty, so no token could be generated")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: SamplingParams | None = None) -> SamplingParams:
        """`base` (or the defaults) with `values` on top; an unknown name is a ValueError with the nearest known one."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"unknown sampling parameter {name!r}{nearest(name, known)}")
        return replace(base or cls(), **dict(values))
