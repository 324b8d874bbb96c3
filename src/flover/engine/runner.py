"""The runner: applies a plan to the device's state, runs the model, samples. It decides nothing.

Row state (length, prefill target, block table) is moved with the row; the sampler keeps its own. Only this file, the
executor and the layers below touch torch tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flover.config import ResolvedConfig
from flover.engine.batch import BatchPlan, IntArray, RowMasks, Scores, StepResult
from flover.kernels.reference.attention import AttentionMetadata
from flover.kernels.reference.sampling import top_logprobs
from flover.kv.storage import KVStorage
from flover.layers.attention import ForwardContext
from flover.layers.linear import Linear
from flover.layers.sampler import Sampler
from flover.models.base import CausalLM
from flover.models.loader import load_model
from flover.parallel import ALONE, Group
from flover.sharding import local_kv_heads, stage_layers
from flover.startup import StartupTimes

Mask = np.ndarray[Any, np.dtype[np.bool_]]
SCORE_ROWS = 128  # prompt positions whose logits exist at a time


class Batch(NamedTuple):
    """The rows that have tokens in a step, ascending; arrays [num rows]."""

    rows: IntArray
    counts: IntArray  # tokens of each
    start: IntArray  # position of its first
    frozen: Mask
    in_prefill: Mask  # its tokens are given, in `prefill_ids`, rows in order; else it takes the one it drew last
    samples: Mask  # it has all its tokens after this step
    prefill_ids: npt.NDArray[np.int32]

    def part(self, chosen: Mask) -> Batch:
        """Some of the rows."""
        ids = self.prefill_ids[np.repeat(chosen[self.in_prefill], self.counts[self.in_prefill])]
        rows = self.rows[chosen], self.counts[chosen], self.start[chosen]
        return Batch(*rows, self.frozen[chosen], self.in_prefill[chosen], self.samples[chosen], ids)


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """At most so many parts of consecutive rows, of about as many tokens each: stages work on them at the same time."""
    if count == 1:
        return [batch]
    middles = np.cumsum(batch.counts) - batch.counts / 2
    which = (middles * count / batch.counts.sum()).astype(np.int64)
    return [batch.part(which == i) for i in np.unique(which)]


class ModelRunner:
    """One device's model, KV cache and row state.

    Args:
        config: effective settings.
        folder: checkpoint folder.
        backend: `kernels.dispatch`.
        times: gets the phases of the start.
        model: another runner's, to be shared: layers hold nothing of a request. None: loaded from the folder.
        group: the ranks that run the same plans, each with its part of the model and the cache.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        folder: Path,
        backend: str = "torch",
        times: StartupTimes | None = None,
        model: CausalLM | None = None,
        group: Group = ALONE,
    ) -> None:
        self.times, self.group = times or StartupTimes(), group
        self.device = torch.device(config.engine.device)
        self.kv_config = config.kv
        self.batch_invariant = config.engine.batch_invariant
        self.model = model or self._load(config, folder, backend)
        kv, rows = config.kv, config.scheduler.max_num_seqs
        sizes = config.model
        kv_heads = local_kv_heads(sizes, group.size)
        begin, end = stage_layers(sizes.num_layers, group.pipe.stage, group.pipe.stages)
        shape = end - begin, kv.num_blocks, kv.block_size, kv_heads, sizes.head_dim
        elastic = kv.layout == "slab" and kv.reorder != "off"
        with self.times.phase("KV cache"):
            self.storage = KVStorage(*shape, getattr(torch, kv.dtype), self.device, backend, elastic)
        before = [self.storage.k[0]] * begin  # layers of other stages, whose caches nothing reads
        self.caches = before + self.storage.k, before + self.storage.v
        self.sampler = Sampler(rows + 1, sizes.vocab_size, self.device, backend, group)  # the last is scratch
        self.tables: IntArray = np.zeros((rows, -(-config.scheduler.max_model_len // kv.block_size)), dtype=np.int64)
        self.edited: dict[int, tuple[int, int]] = {}  # row -> entries of its table that changed since the last step
        self.reset()

    def _load(self, config: ResolvedConfig, folder: Path, backend: str) -> CausalLM:
        with self.times.phase("weights"):
            loaded = load_model(
                folder,
                config.model,
                dtype=getattr(torch, config.engine.dtype),
                device=self.device,
                batch_invariant=self.batch_invariant,
                load_format=config.engine.load_format,
                seed=config.engine.seed,
                backend=backend,
                quantization=config.engine.quantization,
                group=self.group,
            )
            self.times.nbytes["weights"] = sum(parameter.nbytes for parameter in loaded.parameters())
        with self.times.phase("packing"):
            for part in loaded.modules():
                if isinstance(part, Linear):
                    part.pack()
        return loaded

    def wait_asleep(self) -> None:
        """On a GPU: sleep while waiting for a result instead of spinning, where threads are more than cores."""

    def reset(self) -> None:
        """Forget every row (after a failed step)."""
        rows = self.tables.shape[0]
        self._state = np.zeros((5, rows), dtype=np.int64)  # one row per quantity: a relocation is one gather
        self.seq_lens, self.prefill, self.prompt, self.frozen, self.entries = self._state  # entries: of its table
        self.edited.clear()
        self._sample: Callable[[], StepResult] | None = None  # of the step that was launched last
        self.sampler.leave(list(range(rows)))

    def warm_up(self, seconds: float) -> None:
        """Nothing is compiled for these kernels."""

    def close(self) -> None:
        """Nothing runs any more."""

    def empty_result(self) -> StepResult:
        return StepResult(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_))

    def execute(self, plan: BatchPlan) -> StepResult:
        """Apply the plan, run its tokens through the model, sample the rows that have all their tokens."""
        self.launch(plan)
        return self.sample(None)

    @torch.inference_mode()
    def launch(self, plan: BatchPlan) -> None:
        """The first half of `execute`, up to the logits."""
        self._sample = self._forward_of(plan)

    @torch.inference_mode()
    def sample(self, masks: RowMasks | None) -> StepResult:
        """The second half, with the masks of grammars; nothing may be launched in between."""
        sample, self._sample = self._sample, None
        assert sample is not None, "no step was launched"
        if masks is not None and masks.rows:
            bits = np.frombuffer(masks.bits, dtype=np.int32).reshape(len(masks.rows), -1).copy()  # writable, for torch
            self.sampler.set_masks(masks.rows, bits)
        return sample()

    def _forward_of(self, plan: BatchPlan) -> Callable[[], StepResult]:
        """Run a plan up to the logits; -> its sampling."""
        self._apply(plan)
        batch = self._batch(plan)
        if batch is None:
            return self.empty_result
        pipe = self.group.pipe
        hidden = torch.cat([self._forward(part) for part in micro_batches(batch, pipe.stages)])
        pipe.flush()
        ends = np.cumsum(batch.counts)
        first = dict(zip(batch.rows.tolist(), (ends - batch.counts).tolist()))
        scores, pooled = self._of_prompts(plan, batch, hidden, first)
        if not batch.samples.any():
            return lambda: self.empty_result()._replace(prompt_scores=scores, pooled=pooled)
        logits = self.model.compute_logits(hidden[self._tensor(ends[batch.samples] - 1)])

        def sample() -> StepResult:
            output = self.sampler.sample(logits, self._tensor(batch.rows[batch.samples]))
            logprobs = None if output.logprobs is None else Scores(*(part.cpu().numpy() for part in output.logprobs))
            exhausted = None if output.exhausted is None else output.exhausted.cpu().numpy()
            tokens, finite = output.token_ids.cpu().numpy(), output.finite.cpu().numpy()
            return StepResult(tokens, finite, logprobs, scores, pooled, exhausted)

        return sample

    def _batch(self, plan: BatchPlan) -> Batch | None:
        """The rows that have tokens in this step, with lengths advanced; None if there are none."""
        scheduled = plan.scheduled().astype(np.int64)
        rows = np.nonzero(scheduled)[0]
        if not rows.size:
            return None
        counts = scheduled[rows]
        frozen = self.frozen[rows] == 1
        start = self.seq_lens[rows] - frozen
        in_prefill = (start < self.prefill[rows]) & ~frozen
        self.seq_lens[rows] += counts * ~frozen
        samples = (self.seq_lens[rows] >= self.prefill[rows]) & ~frozen
        prefill_ids = np.frombuffer(plan.prefill_ids, dtype=np.int32)
        return Batch(rows, counts, start, frozen, in_prefill, samples, prefill_ids)

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
            for row in dst:
                self.edited[row] = (0, int(self.entries[row]))
            self.sampler.relocate(plan.relocations)
        self.frozen[plan.frozen] = 1
        for join in plan.joins:
            lengths = join.num_computed_tokens, join.num_prefill_tokens, join.num_prompt_tokens
            self._state[:, join.row] = *lengths, 0, 0
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
            end = first + len(ids)
            self.entries[row] = max(self.entries[row], end)
            lo, hi = self.edited.get(row, (first, 0))
            self.edited[row] = (min(lo, first), max(hi, end))

    def _forward(self, batch: Batch) -> Tensor:
        size, counts = self.kv_config.block_size, batch.counts
        ends = np.cumsum(counts)
        positions = np.arange(ends[-1]) - np.repeat(ends - counts - batch.start, counts)
        row_of = np.repeat(batch.rows, counts)  # [num_tokens]
        slots = self.tables[row_of, positions // size] * size + positions % size
        slots[np.repeat(batch.frozen, counts)] = self.storage.scratch
        input_ids = self.sampler.last_token[self._tensor(row_of)]
        prefill_ids = self._tensor(batch.prefill_ids.astype(np.int64))
        input_ids[self._tensor(np.repeat(batch.in_prefill, counts))] = prefill_ids
        lengths = (positions[ends - 1] + 1).tolist()
        ctx = ForwardContext(
            k_cache=self.caches[0],
            v_cache=self.caches[1],
            slot_mapping=self._tensor(slots),
            prompt_lens=self._tensor(self.prompt[row_of]),
            meta=AttentionMetadata(
                query_start=[0, *ends.tolist()],
                seq_lens=lengths,
                blocks=[self._tensor(self.tables[row, : -(-n // size)]) for row, n in zip(batch.rows, lengths)],
                block_size=size,
                contiguous=self.kv_config.layout == "slab",
            ),
            batch_invariant=self.batch_invariant,
        )
        hidden: Tensor = self.model.forward(input_ids, self._tensor(positions), ctx)
        return hidden

    def _of_prompts(
        self, plan: BatchPlan, batch: Batch, hidden: Tensor, first: dict[int, int]
    ) -> tuple[tuple[Scores, ...], tuple[npt.NDArray[np.float32], ...]]:
        """A plan's `scored` and `pooled`, of the last stage. first: of each row, where its tokens begin in `hidden`."""
        if not self.group.pipe.last:
            return (), ()
        scores = tuple(self._score(hidden[first[row] :], best, ids) for row, _, best, ids in plan.scored)
        counts = dict(zip(batch.rows.tolist(), batch.counts.tolist())) if plan.pooled else {}
        parts = [(hidden[first[row] : first[row] + counts[row]].float(), mean) for row, _, mean in plan.pooled]
        return scores, tuple((part.sum(0) if mean else part[-1]).cpu().numpy() for part, mean in parts)

    def _logits(self, hidden: Tensor) -> Tensor:
        """All logits `[n, vocab_size]`, whatever part of them is this rank's."""
        return self.sampler.whole(self.model.compute_logits(hidden))

    def _score(self, hidden: Tensor, best: int, ids: list[int]) -> Scores:
        """Log-probabilities of the prompt tokens `ids`, each predicted by one row of hidden, slice by slice."""
        targets = torch.tensor(ids, dtype=torch.int64, device=self.device)
        parts = [
            top_logprobs(self._logits(hidden[i : min(i + SCORE_ROWS, len(ids))]), part, best)
            for i, part in zip(range(0, len(ids), SCORE_ROWS), torch.split(targets, SCORE_ROWS))
        ]
        if not parts:
            empty = np.zeros((0, 0), dtype=np.int64)
            return Scores(np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64), empty, empty.astype(np.float32))
        return Scores(*(torch.cat(column).cpu().numpy() for column in zip(*parts)))
