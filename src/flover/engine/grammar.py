"""Grammars while requests run: compiled off the step loop, a mask for each draw, tokens taken in as they are confirmed.

A matcher is brought up to date from its request's tokens when a mask is wanted, so preemption, failed steps and late
endings need no care here. Bounded by llguidance's fuel, and by seconds for a mask: who exceeds them ends alone.
`engine.grammar_check` has compiled every grammar once before, in a process that can be killed. Imports no torch.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flover.engine.batch import RowMasks
from flover.engine.step import Step
from flover.request import GRAMMAR_FAILED, Request

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_COMPILED = 128  # grammars kept
MASK_SECONDS = 0.5  # for one mask: a grammar that takes longer holds every other row up


class Vocabulary:
    """A tokenizer as llguidance sees it, made at first use.

    Args:
        folder: of the checkpoint. size: of the model's vocabulary. eos_token_ids: any of them ends a text.
    """

    def __init__(self, folder: Path, size: int, eos_token_ids: Sequence[int]) -> None:
        self.folder, self.size, self.eos_token_ids = folder, size, list(eos_token_ids)
        self._tokenizer: Any = None

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of the text.

        Raises:
            ValueError: llguidance is missing, the tokenizer does not suit it, or the grammar is none.
        """
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer

        if self._tokenizer is None:
            text = (self.folder / "tokenizer.json").read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(text, n_vocab=self.size, eos_token=self.eos_token_ids or None)
        limits = LLParserLimits(
            initial_lexer_fuel=300_000, step_lexer_fuel=50_000, max_lexer_states=50_000, verbose_errors=False
        )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(one_line(matcher))
        return matcher

    @property
    def mask_bytes(self) -> int:
        """Of one mask: whole words of 32 bits."""
        return -(-self.size // 32) * 4


def one_line(matcher: LLMatcher) -> str:
    """Why it is in error."""
    reason = matcher.get_error().split("<non-verbose/>")[0].split("\n   1 | ")[0]  # what follows lists the source
    return " ".join(reason.split())[:300]


class Matcher:
    """The state of one request's grammar."""

    def __init__(self, compiled: Future[LLMatcher]) -> None:
        self._compiled = compiled
        self._matcher: LLMatcher | None = None
        self._taken = 0  # output tokens

    @property
    def ready(self) -> bool:
        return self._compiled.done()

    def mask_into(self, tokens: list[int], num_prompt: int, target: np.ndarray[Any, Any]) -> None:
        """The mask of the next token, after `tokens[num_prompt:]`; ValueError says what is wrong with the grammar."""
        if self._matcher is None:
            self._matcher = self._compiled.result().deep_copy()
        matcher, begun = self._matcher, time.perf_counter()
        new = tokens[num_prompt + self._taken :]
        self._taken += len(new)
        if new:
            matcher.consume_tokens(new)
        matcher.unsafe_compute_mask_ptr(target.ctypes.data, target.nbytes)
        if matcher.is_error():
            raise ValueError(one_line(matcher))
        seconds = time.perf_counter() - begun
        if seconds > MASK_SECONDS:
            raise ValueError(f"a mask took {seconds:.1f} s, the limit is {MASK_SECONDS} s; use a simpler grammar")


class Grammars:
    """All matchers of an engine, and the thread that compiles."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._thread: ThreadPoolExecutor | None = None
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._awaited: set[Future[LLMatcher]] = set()  # not seen done by `wait`

    def add(self, request: Request) -> None:
        """Give a request its matcher, which may not be ready yet; requests of one grammar share the compiling."""
        future = self._compiled.pop(request.grammar, None)
        if future is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="flover-grammar")
            future = self._thread.submit(self._vocabulary.compile, request.grammar)
            self._awaited = {one for one in self._awaited if not one.done()} | {future}
        self._compiled[request.grammar] = future
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        request.matcher = Matcher(future)

    def wait(self) -> bool:
        """Whether something was being compiled since the last `wait` or `add`; the first of it is done then.

        Also what was done since then counts: whoever has just found it not ready shall look again.
        """
        awaited = self._awaited
        if awaited:
            self._awaited = wait(awaited, return_when="FIRST_COMPLETED").not_done
        return bool(awaited)

    def masks(self, step: Step) -> tuple[RowMasks, list[tuple[Request, str]]]:
        """Masks for the rows that a step samples; and requests that cannot go on, with why.

        Everything before that step must have been taken in.
        """
        sampled = {id(request) for request in step.sampled if request.grammar and not request.finished}
        rows = [row for row, request in enumerate(step.rows) if id(request) in sampled]
        bits = np.full((len(rows), self._vocabulary.mask_bytes // 4), -1, dtype=np.int32)
        failed = []
        for mask, row in zip(bits, rows):
            request = step.rows[row]
            try:
                request.matcher.mask_into(request.token_ids, request.num_prompt_tokens, mask)
            except Exception as error:  # whatever it is, the other rows go on
                failed.append((request, f"{GRAMMAR_FAILED}{error}"))
        return RowMasks(rows, bits.tobytes()), failed

    def shutdown(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
