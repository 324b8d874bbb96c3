"""The runner: applies a plan to the device's state, runs the model, samples. It decides nothing.

Row state (length, prefill target, block table) is moved with the row; the sampler keeps its own. Only this file, the
executor and the layers below touch torch tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flover.config import ResolvedConfig
from flover.engine.batch import BatchPlan, IntArray, Scores, StepResult
from flover.kernels.reference.attention import AttentionMetadata
from flover.kernels.reference.sampling import top_logprobs
from flover.kv.storage import KVStorage
from flover.layers.attention import ForwardContext
from flover.layers.linear import Linear
from flover.layers.sampler import Sampler
from flover.models.base import CausalLM
from flover.models.loader import load_model

Mask = np.ndarray[Any, np.dtype[np.bool_]]
SCORE_ROWS = 128  # prompt positions whose logits exist at a time


class ModelRunner:
    """One device's model, KV cache and row state.

    Args:
        config: effective settings.
        folder: checkpoint folder.
    """

    def __init__(self, config: ResolvedConfig, folder: Path) -> None:
        self.device = torch.device(config.engine.device)
        dtype: torch.dtype = getattr(torch, config.engine.dtype)
        model = config.model
        self.kv_config = config.kv
        self.batch_invariant = config.engine.batch_invariant
        loaded = load_model(
            folder,
            model,
            dtype=dtype,
            device=self.device,
            batch_invariant=self.batch_invariant,
            load_format=config.engine.load_format,
            seed=config.engine.seed,
        )
        for part in loaded.modules():
            if isinstance(part, Linear):
                part.pack()
        self.model = cast(CausalLM, loaded)
        kv, rows = config.kv, config.scheduler.max_num_seqs
        self.storage = KVStorage(
            model.num_layers, kv.num_blocks, kv.block_size, model.num_kv_heads, model.head_dim, dtype, self.device
        )
        self.sampler = Sampler(rows, model.vocab_size, self.device)
        self.tables: IntArray = np.zeros((rows, -(-config.scheduler.max_model_len // kv.block_size)), dtype=np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget every row (after a failed step)."""
        rows = self.tables.shape[0]
        self._state = np.zeros((4, rows), dtype=np.int64)  # one row per quantity: a relocation is one gather
        self.seq_lens, self.prefill, self.prompt, self.frozen = self._state
        self.sampler.leave(list(range(rows)))

    @torch.inference_mode()
    def execute(self, plan: BatchPlan) -> StepResult:
        """Apply the plan, run its tokens through the model, sample the rows that have all their tokens."""
        self._apply(plan)
        scheduled = plan.scheduled().astype(np.int64)
        active = np.nonzero(scheduled)[0]
        if not active.size:
            return StepResult(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_))
        counts = scheduled[active]
        frozen = self.frozen[active] == 1
        start = self.seq_lens[active] - frozen
        ends = np.cumsum(counts)
        positions = np.arange(ends[-1]) - np.repeat(ends - counts - start, counts)
        in_prefill = (start < self.prefill[active]) & ~frozen
        hidden = self._forward(plan, active, counts, positions, in_prefill, frozen)
        self.seq_lens[active] += counts * ~frozen
        samples = (self.seq_lens[active] >= self.prefill[active]) & ~frozen
        first = dict(zip(active.tolist(), (ends - counts).tolist()))
        scores = tuple(self._score(hidden[first[row] :], best, ids) for row, _, best, ids in plan.scored)
        if not samples.any():
            return StepResult(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_), prompt_scores=scores)
        logits = self.model.compute_logits(hidden[self._tensor(ends[samples] - 1)])
        output = self.sampler.sample(logits, self._tensor(active[samples]))
        logprobs = None if output.logprobs is None else Scores(*(part.cpu().numpy() for part in output.logprobs))
        return StepResult(output.token_ids.cpu().numpy(), output.finite.cpu().numpy(), logprobs, scores)

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _apply(self, plan: BatchPlan) -> None:
        self.storage.apply(plan.moves, plan.freed, plan.reserved_blocks)
        if plan.leaves:
            self.sampler.leave(plan.leaves)
        if plan.relocations:
            src, dst = (list(rows) for rows in zip(*plan.relocations))
            self._state[:, dst] = self._state[:, src]
            self.tables[dst] = self.tables[src]
            self.sampler.relocate(torch.tensor(src), torch.tensor(dst))
        self.frozen[plan.frozen] = 1
        for join in plan.joins:
            self._state[:, join.row] = (
                join.num_computed_tokens,
                join.num_prefill_tokens,
                join.num_prompt_tokens,
                0,
            )
        if plan.joins:
            histories = [join.history or ([], []) for join in plan.joins]
            self.sampler.join(
                [join.row for join in plan.joins],
                [join.sampling for join in plan.joins],
                [join.num_prefill_tokens - join.num_prompt_tokens for join in plan.joins],
                [prompt for prompt, _ in histories],
                [outputs for _, outputs in histories],
            )
        for row, first, ids in plan.tables:
            self.tables[row, first : first + len(ids)] = ids

    def _forward(
        self,
        plan: BatchPlan,
        active: IntArray,  # rows with tokens in this step
        counts: IntArray,  # of tokens, per active row
        positions: IntArray,  # [num_tokens]
        in_prefill: Mask,
        frozen: Mask,
    ) -> Tensor:
        size = self.kv_config.block_size
        row_of = np.repeat(active, counts)  # [num_tokens]
        slots = self.tables[row_of, positions // size] * size + positions % size
        slots[np.repeat(frozen, counts)] = self.storage.scratch
        input_ids = self.sampler.last_token[self._tensor(row_of)]
        prefill_ids = np.frombuffer(plan.prefill_ids, dtype=np.int32).astype(np.int64)
        input_ids[self._tensor(np.repeat(in_prefill, counts))] = self._tensor(prefill_ids)
        ends = np.cumsum(counts)
        lengths = (positions[ends - 1] + 1).tolist()
        ctx = ForwardContext(
            k_cache=self.storage.k,
            v_cache=self.storage.v,
            slot_mapping=self._tensor(slots),
            prompt_lens=self._tensor(self.prompt[row_of]),
            meta=AttentionMetadata(
                query_start=[0, *ends.tolist()],
                seq_lens=lengths,
                blocks=[self._tensor(self.tables[row, : -(-n // size)]) for row, n in zip(active, lengths)],
                block_size=size,
                contiguous=self.kv_config.layout == "slab",
            ),
            batch_invariant=self.batch_invariant,
        )
        hidden: Tensor = self.model.forward(input_ids, self._tensor(positions), ctx)
        return hidden

    def _score(self, hidden: Tensor, best: int, ids: list[int]) -> Scores:
        """Log-probabilities of the prompt tokens `ids`, each predicted by one row of hidden, slice by slice."""
        targets = torch.tensor(ids, dtype=torch.int64, device=self.device)
        parts = [
            top_logprobs(self.model.compute_logits(hidden[i : min(i + SCORE_ROWS, len(ids))]), part, best)
            for i, part in zip(range(0, len(ids), SCORE_ROWS), torch.split(targets, SCORE_ROWS))
        ]
        if not parts:
            empty = np.zeros((0, 0), dtype=np.int64)
            return Scores(np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64), empty, empty.astype(np.float32))
        return Scores(*(torch.cat(column).cpu().numpy() for column in zip(*parts)))
