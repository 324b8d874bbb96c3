"""What the sampler remembers of its rows: the layout of the packed state, and tables for the rarer features.

`Field` lays out what every row has: seed, choice, counts, parameters. `RowTables` holds what few rows need:
token counts for penalties, biases, bad words with the last output ids, stop ids, masks. Invariant: a table exists only
once a row has needed it, and is neutral in every row that did not ask for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flover.request import RowSampling


class Field(IntEnum):
    """The packed state is [fields, max_rows] int64; from TEMPERATURE on, the bits of a float64."""

    SEED = 0
    CHOICE = 1
    NUM_OUTPUTS = 2
    LAST_TOKEN = 3
    TOP_K = 4  # 0: all
    MIN_TOKENS = 5
    COUNTED = 6  # what an output adds to the penalty table: 2, or 0 without penalties
    TEMPERATURE = 7  # 1 if greedy
    RANDOM = 8  # 1, or 0 if greedy
    TOP_P = 9
    MIN_P = 10
    REPETITION = 11
    FREQUENCY = 12
    PRESENCE = 13


class Needs(NamedTuple):
    """What a row, or several together, asks of the pass: which steps run, and how wide."""

    random: bool = False
    max_top_k: int = 0
    top_p: bool = False
    open_top_p: bool = False  # top-p that no top-k bounds
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    bad_words: bool = False
    min_tokens: bool = False
    num_logprobs: int = -1
    masks: bool = False

    @property
    def best_decides(self) -> bool:
        """Whether a token is the best of scores that each depend on one logit: no filter, no table, no logprobs."""
        return self._replace(random=False) == Needs()

    @classmethod
    def of(cls, s: RowSampling, vocab_size: int) -> Needs:
        random = s.temperature >= 1e-5  # less is too small to divide by
        top_k = s.top_k if random and 0 < s.top_k < vocab_size else 0
        top_p = random and s.top_p < 1.0
        return cls(
            random=random,
            max_top_k=top_k,
            top_p=top_p,
            open_top_p=top_p and not top_k,
            min_p=random and s.min_p > 0.0,
            penalties=(s.repetition_penalty, s.frequency_penalty, s.presence_penalty) != (1.0, 0.0, 0.0),
            bias=bool(s.logit_bias) or s.allowed_token_ids is not None,
            bad_words=any(s.bad_words),
            min_tokens=s.min_tokens > 0 and bool(s.stop_token_ids),
            num_logprobs=s.logprobs,
            masks=s.masked,
        )

    @property
    def masking(self) -> bool:
        """Whether tokens may be masked, or biased, before temperature."""
        return self.bias or self.bad_words or self.min_tokens or self.masks

    @classmethod
    def merge(cls, needs: Iterable[Needs]) -> Needs:
        return cls(*(max(column) for column in zip(cls(), *needs, strict=True)))


class RowTable:
    """A [max_rows, ...] tensor, allocated at first use, and neutral in the rows that are not `used`."""

    def __init__(self, max_rows: int, neutral: float, dtype: torch.dtype, device: torch.device) -> None:
        self.max_rows, self.neutral, self.dtype, self.device = max_rows, neutral, dtype, device
        self.data: Tensor | None = None
        self.used: set[int] = set()

    def prepare(self, index: Tensor, rows: Sequence[int], users: Sequence[int], *shape: int) -> Tensor | None:
        """Make the joining `rows` neutral; if some are `users`, grow to `shape` and return the table."""
        if self.data is not None and not self.used.isdisjoint(rows):
            self.data.index_fill_(0, index, self.neutral)
            self.used.difference_update(rows)
        if not users:
            return None
        self.used.update(users)
        have = self.data.shape[1:] if self.data is not None else (0,) * len(shape)
        if any(want > size for want, size in zip(shape, have, strict=True)):
            old, shape = self.data, tuple(map(max, shape, have))
            self.data = torch.full((self.max_rows, *shape), self.neutral, dtype=self.dtype, device=self.device)
            if old is not None:  # contents are right-aligned in every dimension
                self.data[tuple(slice(-size, None) for size in old.shape)] = old
        return self.data

    def relocate(self, src: Tensor, dst: Tensor, moves: Sequence[tuple[int, int]]) -> None:
        if self.data is None or not any(s in self.used or d in self.used for s, d in moves):
            return
        self.data.index_copy_(0, dst, self.data.index_select(0, src))
        arrived = {d for s, d in moves if s in self.used}
        self.used = (self.used - {d for _, d in moves}) | arrived

    def of(self, rows: Tensor) -> Tensor:
        assert self.data is not None
        return self.data.index_select(0, rows)


class Join(NamedTuple):
    """The rows that join, entry by entry."""

    at: Tensor  # [n] int64 on the device, the same as `rows`
    rows: list[int]
    needs: list[Needs]
    sampling: list[RowSampling]
    prompt_ids: list[Sequence[int]]
    output_ids: list[Sequence[int]]


def send(device: torch.device, *arrays: npt.ArrayLike) -> list[Tensor]:
    """int64 arrays on the device, each flattened: one copy for all of them."""
    parts = [np.asarray(a, dtype=np.int64).reshape(-1) for a in arrays]
    packed = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        packed = packed.pin_memory()
    return list(packed.to(device, non_blocking=True).split_with_sizes([len(p) for p in parts]))


class RowTables:
    """The tables, in the shapes that the functions of kernels/reference/sampling.py take."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.history = RowTable(max_rows, 0, torch.int32, device)  # [max_rows, vocab]
        self.bias = RowTable(max_rows, -0.0, torch.float32, device)  # [max_rows, vocab], -inf: not allowed
        self.words = RowTable(max_rows, -1, torch.int64, device)  # [max_rows, words, length]
        self.recent = RowTable(max_rows, -2, torch.int64, device)  # [max_rows, length - 1]
        self.stop_ids = RowTable(max_rows, -1, torch.int64, device)  # [max_rows, ids]
        self.masks = RowTable(max_rows, -1, torch.int32, device)  # [max_rows, vocab / 32], bits: 1 is allowed

    def join(self, join: Join) -> None:
        self._join_history(join)
        self._join_bias(join)
        self._join_words(join)
        self._join_stop_ids(join)
        users = [row for row, n in zip(join.rows, join.needs) if n.masks]
        self.masks.prepare(join.at, join.rows, users, -(-self.vocab_size // 32))

    def relocate(self, src: Tensor, dst: Tensor, moves: Sequence[tuple[int, int]]) -> None:
        for table in (self.history, self.bias, self.words, self.recent, self.stop_ids, self.masks):
            table.relocate(src, dst, moves)

    def _join_history(self, join: Join) -> None:
        users = [i for i, n in enumerate(join.needs) if n.penalties]
        data = self.history.prepare(join.at, join.rows, [join.rows[i] for i in users], self.vocab_size)
        if data is None:
            return
        prompts, outputs = send(
            self.device,
            *(
                np.concatenate([np.array(ids[i], np.int64) + join.rows[i] * self.vocab_size for i in users])
                for ids in (join.prompt_ids, join.output_ids)
            ),
        )
        data.view(-1).index_fill_(0, prompts, 1)
        data.view(-1).index_add_(0, outputs, torch.full_like(outputs, 2, dtype=torch.int32))

    def _join_bias(self, join: Join) -> None:
        users = [i for i, n in enumerate(join.needs) if n.bias]
        data = self.bias.prepare(join.at, join.rows, [join.rows[i] for i in users], self.vocab_size)
        if data is None:
            return
        limited = [(join.rows[i], ids) for i in users if (ids := join.sampling[i].allowed_token_ids) is not None]
        biased = [
            (join.rows[i] * self.vocab_size + token, value)
            for i in users
            for token, value in join.sampling[i].logit_bias
        ]
        closed, allowed, where, bits = send(
            self.device,
            [row for row, _ in limited],
            [row * self.vocab_size + token for row, ids in limited for token in ids],
            [i for i, _ in biased],
            np.array([value for _, value in biased], np.float64).view(np.int64),
        )
        data.index_fill_(0, closed, -math.inf)
        data.view(-1).index_fill_(0, allowed, -0.0)
        data.view(-1).index_add_(0, where, bits.view(torch.float64).float())

    def _join_words(self, join: Join) -> None:
        users = [i for i, n in enumerate(join.needs) if n.bad_words]
        rows = [join.rows[i] for i in users]
        lists = [[word for word in join.sampling[i].bad_words if word] for i in users]
        count = max((len(words) for words in lists), default=0)
        length = max((len(word) for words in lists for word in words), default=0)
        length = max(length, 2)
        words = self.words.prepare(join.at, join.rows, rows, count, length)
        recent = self.recent.prepare(join.at, join.rows, rows, length - 1)
        if words is None or recent is None:
            return
        new_words = np.full((len(users), count, length), -1)
        new_recent = np.full((len(users), length - 1), -2)
        for i, user in enumerate(users):
            for j, word in enumerate(lists[i]):
                new_words[i, j, length - len(word) :] = word
            tail = join.output_ids[user][-(length - 1) :]
            new_recent[i, length - 1 - len(tail) :] = tail
        at, w, r = send(self.device, rows, new_words, new_recent)
        words[at, -count:, -length:] = w.view(new_words.shape)
        recent[at, -(length - 1) :] = r.view(new_recent.shape)

    def _join_stop_ids(self, join: Join) -> None:
        users = [i for i, n in enumerate(join.needs) if n.min_tokens]
        rows = [join.rows[i] for i in users]
        count = max((len(join.sampling[i].stop_token_ids) for i in users), default=0)
        data = self.stop_ids.prepare(join.at, join.rows, rows, count)
        if data is None:
            return
        padded = np.full((len(users), count), -1)
        for i, user in enumerate(users):
            ids = join.sampling[user].stop_token_ids
            padded[i, : len(ids)] = ids
        at, stop_ids = send(self.device, rows, padded)
        data[at, -count:] = stop_ids.view(padded.shape)
