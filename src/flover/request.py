"""A request on its way: `Request`, what its row's sampler is told (`RowSampling`), and what comes back.

What a user asks for is in `flover.sampling_params`. No torch here. Field names follow vLLM and the OpenAI API.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from flover.sampling_params import SamplingParams as SamplingParams  # importable from here too


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(str, Enum):
    STOP = "stop"  # EOS, a stop token id or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the caller withdrew it
    ERROR = "error"  # NaN logits, a failed step; the request's `error` says why


NOTHING_LEFT = "no token is left to choose: grammar, logit_bias, allowed_token_ids, bad_words and min_tokens mask all"
GRAMMAR_FAILED = "structured_outputs failed while generating: "


def is_own_fault(error: str | None) -> bool:
    """Whether a request that ended with this error asked for what cannot be."""
    return error is not None and (error == NOTHING_LEFT or error.startswith(GRAMMAR_FAILED))


class ContextLengthError(ValueError):
    """A prompt, or a prompt with its output, that is longer than the context."""


class RowSampling(msgspec.Struct, frozen=True, array_like=True):
    """What the sampler of one row is told when it joins: resolved, model-aware, msgspec-encodable."""

    seed: int
    choice: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # each a sequence of token ids
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # all ids masked until min_tokens: EOS and the user's
    logprobs: int = -1  # best log-probabilities wanted per token; -1: none at all
    masked: bool = False  # the host says before each draw which tokens are allowed (a grammar)

    @property
    def needs_history(self) -> bool:
        """Whether the sampler must know the ids of the prompt and of earlier outputs when the row joins."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or any(len(w) > 1 for w in self.bad_words)


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token under the raw logits; rank 1 is the best token."""

    logprob: float
    rank: int
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]


@dataclass(eq=False, slots=True)
class Request:
    """One row-to-be: a prompt, one choice of it, and its progress. Owned by the scheduler once added.

    `token_ids` is the prompt followed by the confirmed outputs. Invariant: it only grows, and only in
    `Scheduler.update`.
    """

    request_id: str
    token_ids: list[int]
    sampling: RowSampling
    max_output_tokens: int
    stop_token_ids: frozenset[int] = frozenset()  # every id that ends it: EOS and the user's
    eos_token_ids: frozenset[int] = frozenset()  # those of them that give no stop_reason
    prompt_logprobs: int = -1
    priority: int = 0
    cache_salt: str = ""
    client: str = ""  # who asks, for fair sharing
    arrival_time: float = 0.0
    pooling: str = ""  # "last" or "mean": what of the prompt's last hidden states makes its embedding
    grammar: str = ""  # that its text must follow, for llguidance; "": none
    sibling: Request | None = None  # choice 0 of the same prompt, whose prompt blocks this one may share
    key: str = ""  # names the request to the KV allocator; unique for ever, unlike request_id
    arrival: int = -1  # order of addition
    row: int = -1  # in the running batch
    num_prompt_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    matcher: Any = None  # the state of its grammar after so many tokens (`engine.grammar.Matcher`)
    embedding: bytes = b""  # float32 [hidden_size], of any length; a sum for "mean"
    num_cached_tokens: int = 0
    num_in_flight: int = 0  # sampled tokens that the host has not seen yet
    num_preemptions: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprob_list: list[TokenLogprobs | None] | None = None
    cumulative_logprob: float = 0.0
    first_scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    finish_time: float = 0.0

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED


@dataclass(slots=True)
class RequestMetrics:
    """Seconds on one clock. TTFT: arrival to first token; TPOT: mean gap after it; E2E: arrival to last token."""

    arrival_time: float
    first_scheduled_time: float
    first_token_time: float
    last_token_time: float
    finished_time: float
    num_output_tokens: int
    num_preemptions: int

    @property
    def ttft(self) -> float:
        return self.first_token_time - self.arrival_time

    @property
    def tpot(self) -> float:
        return (self.last_token_time - self.first_token_time) / max(self.num_output_tokens - 1, 1)

    @property
    def e2e(self) -> float:
        return self.last_token_time - self.arrival_time


@dataclass(slots=True)
class CompletionOutput:
    """One choice. `text` holds whole characters only; `finish_reason` is None while it runs."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """All choices of one prompt; `finished` once every choice has ended."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    embedding: list[float] | None = None  # of length 1, [hidden_size]
    metrics: RequestMetrics | None = field(default=None)
