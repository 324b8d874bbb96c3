"""The sampler: the state of all rows, and one batched pass that draws the next token of some and records it.

Invariants: a row's tokens depend on its logits, its `RowSampling` and its outputs so far, never on the batch
or the row's index. The number of launches depends on what the joined rows need, not on how many they are;
`needs` is exact over any sequence of join, relocate and leave; what no row needs is skipped, changing no bit.
The steps and their order are vLLM v1's; `kernels/reference/sampling.py` says what each one means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flover.kernels.dispatch import load_backend
from flover.kernels.reference import sampling as ops
from flover.layers.sampler_state import Field, Join, Needs, RowTables, send
from flover.parallel import ALONE, Group
from flover.request import RowSampling
from flover.sharding import Part, vocab_part


class SamplerOutput(NamedTuple):
    """What one pass drew."""

    token_ids: Tensor  # [n] int64, 0 where not finite
    finite: Tensor  # [n] bool: no NaN or +inf in the logits, and something left to choose
    # chosen logprob [n], its rank [n], ids of the k best [n, k], their logprobs [n, k]; None: not wanted
    logprobs: tuple[Tensor, Tensor, Tensor, Tensor] | None
    exhausted: Tensor | None = None  # [n] bool: not finite because all is masked; None: no row masks tokens


def _pack(
    sampling: Sequence[RowSampling], needs: Sequence[Needs], num_outputs: Sequence[int], last: Sequence[int]
) -> npt.NDArray[np.int64]:
    """[fields, n] in the order of `Field`; filters are neutral where the row does not need them."""
    ints = [
        (
            s.seed if s.seed < 2**63 else s.seed - 2**64,
            s.choice,
            count,
            token,
            n.max_top_k,
            s.min_tokens if n.min_tokens else 0,
            2 if n.penalties else 0,
        )
        for s, n, count, token in zip(sampling, needs, num_outputs, last, strict=True)
    ]
    floats = [
        (
            s.temperature if n.random else 1.0,
            float(n.random),
            s.top_p if n.top_p else 1.0,
            s.min_p if n.min_p else 0.0,
            s.repetition_penalty,
            s.frequency_penalty,
            s.presence_penalty,
        )
        for s, n in zip(sampling, needs, strict=True)
    ]
    packed: npt.NDArray[np.int64] = np.array(ints, np.int64).T
    params: npt.NDArray[np.int64] = np.array(floats, np.float64).view(np.int64).T
    return np.concatenate([packed, params])


def _check_ids(s: RowSampling, prompt: Sequence[int], output: Sequence[int], vocab_size: int) -> None:
    """A token id that no table has room for would be a device fault, which ends every request."""
    lists: dict[str, Sequence[int]] = {
        "logit_bias": [token for token, _ in s.logit_bias],
        "bad_words": [token for word in s.bad_words for token in word],
        "allowed_token_ids": s.allowed_token_ids or (),
        "stop_token_ids": s.stop_token_ids if s.min_tokens > 0 else (),
        "prompt": prompt if s.needs_history else (),
        "output": output if s.needs_history else (),
    }
    for name, ids in lists.items():
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
            bad = next(i for i in ids if not 0 <= i < vocab_size)
            raise ValueError(f"{name} holds token id {bad}, the vocabulary has {vocab_size}")


def _randomness(state: Tensor, needs: Needs) -> dict[str, Any]:
    """What every way to draw is told of the rows, whose `state` is `[fields, n]`: temperatures, and where they draw."""
    params = state.view(torch.float64)
    return {
        "temperature": params[Field.TEMPERATURE],
        "random": params[Field.RANDOM] if needs.random else None,
        "seeds": state[Field.SEED],
        "choices": state[Field.CHOICE],
        "positions": state[Field.NUM_OUTPUTS],
    }


class Sampler:
    """Sampling of rows [0, max_rows). Within a step the order is leave, relocate, join, sample.

    backend: whose `draw` picks the tokens (`kernels.dispatch`).
    group: the ranks among which the logits are divided. Each takes the best of its ids, and only these are compared;
        where filters, penalties or log-probabilities need all logits, they are gathered, and what rank 0 draws counts.
        Of a pipeline the last stage has the logits and draws; the others learn what.
    """

    def __init__(
        self, max_rows: int, vocab_size: int, device: torch.device, backend: str = "torch", group: Group = ALONE
    ) -> None:
        self.max_rows, self.vocab_size, self.device = max_rows, vocab_size, device
        self.group = group
        self.part = vocab_part(vocab_size, group.rank, group.size) if group.pipe.last else Part(0, ((0, 0),))
        self._backend = load_backend(backend)
        neutral = torch.zeros(len(Field), max_rows, dtype=torch.int64)  # greedy: padding rows may be sampled
        neutral.view(torch.float64)[[Field.TEMPERATURE, Field.TOP_P, Field.REPETITION]] = 1.0
        self._state = neutral.to(device)
        self._tables = RowTables(max_rows, vocab_size, device)
        self._row_needs: dict[int, Needs] = {}  # joined rows
        self._live: Counter[Needs] = Counter()
        self._merged: Needs | None = None

    @property
    def last_token(self) -> Tensor:
        """[max_rows] int64, the token each row drew last; a view whose address never changes."""
        return self._state[Field.LAST_TOKEN]

    @property
    def needs(self) -> Needs:
        """What the joined rows need together."""
        if self._merged is None:
            self._merged = Needs.merge(self._live)
        return self._merged

    def join(
        self,
        rows: list[int],
        sampling: list[RowSampling],
        num_outputs: list[int],
        prompt_ids: list[Sequence[int]],
        output_ids: list[Sequence[int]],
    ) -> None:
        """Set up rows; whatever they held before is gone.

        Args:
            rows: distinct rows.
            num_outputs: how many tokens each has generated already, before a preemption.
            prompt_ids, output_ids: the ids, for rows whose `sampling.needs_history`; else they may be empty.

        Raises:
            ValueError: a token id outside the vocabulary. Nothing has changed then.
        """
        if not rows:
            return
        for s, prompt, output in zip(sampling, prompt_ids, output_ids, strict=True):
            _check_ids(s, prompt, output, self.vocab_size)
        self.leave(rows)
        needs = [Needs.of(s, self.vocab_size) for s in sampling]
        last = [
            output[-1] if len(output) else prompt[-1] if len(prompt) else 0
            for prompt, output in zip(prompt_ids, output_ids, strict=True)
        ]
        at, packed = send(self.device, rows, _pack(sampling, needs, num_outputs, last))
        self._state.index_copy_(1, at, packed.view(len(Field), -1))
        self._tables.join(Join(at, rows, needs, sampling, prompt_ids, output_ids))
        self._row_needs.update(zip(rows, needs, strict=True))
        self._live.update(needs)
        self._merged = None

    def relocate(self, moves: Sequence[tuple[int, int]]) -> None:
        """Move rows (src, dst), all at once; what dst held is gone, and a src that is no dst is vacated.

        moves: sources distinct, destinations distinct.
        """
        src, dst = send(self.device, [s for s, _ in moves], [d for _, d in moves])
        self._state.index_copy_(1, dst, self._state.index_select(1, src))
        self._tables.relocate(src, dst, moves)
        arrived = {d: self._row_needs.pop(s) for s, d in moves if s in self._row_needs}
        self.leave([d for _, d in moves])
        self._row_needs.update(arrived)

    def leave(self, rows: list[int]) -> None:
        """Forget rows; touches the host mirror only."""
        for row in rows:
            needs = self._row_needs.pop(row, None)
            if needs is not None:
                self._live[needs] -= 1
                if not self._live[needs]:
                    del self._live[needs]
                    self._merged = None

    def set_masks(self, rows: Sequence[int], bits: npt.NDArray[np.int32]) -> None:
        """Which tokens rows that joined with `masked` may draw next, until they are told again.

        bits: [len(rows), ceil(vocab / 32)], the lowest bit first; 1 is allowed.
        """
        table = self._tables.masks.data
        if not rows or table is None:
            return
        packed = torch.from_numpy(bits)
        if self.device.type == "cuda":
            packed = packed.pin_memory()
        (at,) = send(self.device, rows)
        table.index_copy_(0, at, packed.to(self.device, non_blocking=True))

    def sample(self, logits: Tensor, rows: Tensor) -> SamplerOutput:
        """Draw the next token of distinct, joined rows, and update their state.

        Args:
            logits: [n, vocab], any float dtype; not written to. fp64 stays fp64, the rest is upcast to fp32. Of a
                group, this rank's part of them.
            rows: [n] int64, on the device.

        Returns:
            The tokens. Logprobs are of the raw logits, k the most that any joined row wants; those of a row
            that is not finite mean nothing. Where another stage draws, only the tokens.
        """
        assert logits.shape == (rows.shape[0], self.part.size)
        if not self.group.pipe.last:
            return self._drawn_elsewhere(rows)
        needs = self.needs
        state = self._state.index_select(1, rows)  # [fields, n]
        if self.group.size > 1:
            if needs.best_decides:
                token_ids, finite = self._best_of_parts(logits, state, needs)
                self._record(rows, state, token_ids, needs)
                return SamplerOutput(token_ids, finite, None)
            logits = self.whole(logits)
        params = state.view(torch.float64)
        scores = self._process(logits, rows, state, needs)
        token_ids, finite = self._backend.draw(
            scores,
            **_randomness(state, needs),
            top_k=state[Field.TOP_K] if needs.max_top_k else None,
            top_p=params[Field.TOP_P] if needs.top_p else None,
            min_p=params[Field.MIN_P] if needs.min_p else None,
            max_top_k=needs.max_top_k,
            open_top_p=needs.open_top_p,
        )
        if self.group.size > 1:
            drawn = self.group.broadcast(torch.where(finite, token_ids, -1))
            finite = drawn >= 0
            token_ids = drawn * finite
        logprobs = None
        if needs.num_logprobs >= 0:
            raw = logits if logits.dtype == torch.float64 else logits.float()
            logprobs = ops.top_logprobs(raw, token_ids, needs.num_logprobs)
        self._record(rows, state, token_ids, needs)
        return SamplerOutput(token_ids, finite, logprobs, scores.amax(-1) == -math.inf if needs.masking else None)

    def _drawn_elsewhere(self, rows: Tensor) -> SamplerOutput:
        """What the last stage draws; all that another one need know of it is the tokens that it embeds next."""
        token_ids = self.group.pipe.share(torch.empty_like(rows))
        self._state[Field.LAST_TOKEN].index_copy_(0, rows, token_ids)
        return SamplerOutput(token_ids, torch.ones_like(rows, dtype=torch.bool), None)

    def whole(self, logits: Tensor) -> Tensor:
        """All logits `[n, vocab]` of this rank's part of them."""
        if self.group.size == 1:
            return logits
        return self.group.gather(logits).transpose(0, 1).flatten(1)[:, : self.vocab_size].contiguous()

    def _best_of_parts(self, logits: Tensor, state: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
        """Tokens [n] and whether they are finite: the best of each rank's best, the lowest rank's on a tie."""
        begin, end = self.part.ranges[0]
        candidates = self._backend.draw_part(logits[:, : end - begin], begin, **_randomness(state, needs))
        tokens: tuple[Tensor, Tensor] = self._backend.best_of_parts(self.group.gather(candidates))
        return tokens

    @property
    def graph_key(self) -> tuple[bool, ...] | None:
        """What the launches of `sample` depend on besides its shapes; None where tables take part, which may grow."""
        needs = self.needs
        if needs.penalties or needs.masking or needs.num_logprobs >= 0:
            return None
        return needs.random, needs.max_top_k > 0, needs.top_p, needs.min_p

    def _process(self, logits: Tensor, rows: Tensor, state: Tensor, needs: Needs) -> Tensor:
        """What bears on greedy rows too: masks, biases, penalties. `logits` is not written to."""
        if not (needs.masking or needs.penalties):
            return logits
        raw = scores = logits if logits.dtype == torch.float64 else logits.float()
        if needs.bias:
            scores = scores + self._tables.bias.of(rows)
        elif needs.bad_words or needs.min_tokens or needs.masks:
            scores = scores.clone()
        if needs.masks:
            ops.mask_by_bits(scores, self._tables.masks.of(rows))
        if needs.bad_words:
            ops.mask_tokens(scores, *ops.match_bad_words(self._tables.words.of(rows), self._tables.recent.of(rows)))
        if needs.min_tokens:
            stop_ids = self._tables.stop_ids.of(rows)
            early = state[Field.NUM_OUTPUTS] < state[Field.MIN_TOKENS]
            ops.mask_tokens(scores, stop_ids, early[:, None] & (stop_ids >= 0))
        if needs.penalties:
            params = state.view(torch.float64).to(raw.dtype)
            scores = ops.apply_penalties(
                scores,
                self._tables.history.of(rows),
                params[Field.REPETITION],
                params[Field.FREQUENCY],
                params[Field.PRESENCE],
            )
        return scores

    def _record(self, rows: Tensor, state: Tensor, token_ids: Tensor, needs: Needs) -> None:
        self.group.pipe.share(token_ids)
        self._state[Field.LAST_TOKEN].index_copy_(0, rows, token_ids)
        self._state[Field.NUM_OUTPUTS].index_copy_(0, rows, state[Field.NUM_OUTPUTS] + 1)
        if needs.penalties:
            assert self._tables.history.data is not None
            where = rows * self.vocab_size + token_ids
            self._tables.history.data.view(-1).index_add_(0, where, state[Field.COUNTED].to(torch.int32))
        if needs.bad_words:
            assert self._tables.recent.data is not None
            recent = torch.cat([self._tables.recent.of(rows)[:, 1:], token_ids[:, None]], dim=1)
            self._tables.recent.data.index_copy_(0, rows, recent)
