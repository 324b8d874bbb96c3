"""Statement (c) across ranks: every family, divided, computes what it computes whole; and what is read is a part."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from parity import CASES, Case, Checkpoint, Driver, checkpoints, random_prompts
from ranks import on_ranks
from torch import Tensor

from flover.kernels.reference import sampling as ops
from flover.layers.sampler import Sampler
from flover.models import checkpoint as files
from flover.parallel import Group
from flover.request import RowSampling
from flover.sharding import check_ranks, divides, local_kv_heads

MORE = {
    "llama-6-heads": Case("Llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 56}),
    "gpt2-6-heads": Case("GPT2", {"num_attention_heads": 6, "n_positions": 64, "n_inner": 52}),
}
QUICK = ("llama-gqa", "llama-6-heads", "gpt2-6-heads", "neox", "bloom-3-heads", "gptj")
ALL = {**CASES, **MORE}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the logits' std


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return checkpoints(ALL, tmp_path_factory)


class RankDriver(Driver):
    """A driver whose cache has the rank's KV heads, and whose logits are gathered."""

    def __init__(self, checkpoint: Checkpoint, group: Group, layout: str = "paged", **options: Any) -> None:
        module: Any = checkpoint.load(group=group, **options)
        prompts = random_prompts(checkpoint.config.vocab_size, [11, 3, 20])
        super().__init__(module, checkpoint.config, prompts, layout, options.get("batch_invariant", False))
        heads = local_kv_heads(checkpoint.config, group.size)
        self.k = [cache[:, :heads].contiguous() for cache in self.k]
        self.v = [cache[:, :heads].contiguous() for cache in self.v]
        sampler = Sampler(1, checkpoint.config.vocab_size, torch.device("cpu"), group=group)
        compute = module.compute_logits
        module.compute_logits = lambda hidden: sampler.whole(compute(hidden))


def logits(checkpoint: Checkpoint, group: Group, **options: Any) -> list[Tensor]:
    return RankDriver(checkpoint, group, **options).prefill(lambda left: 7)


@pytest.mark.parametrize("name", NAMES)
def test_a_divided_model_computes_the_same(name: str, made: Any) -> None:
    checkpoint = made(name)
    for dtype, tolerance in TOLERANCE.items():
        whole = logits(checkpoint, Group(), dtype=dtype)
        for size in (2, 3, 4):
            if not divides(checkpoint.config, size):
                continue
            ranks = on_ranks(size, partial(logits, checkpoint, dtype=dtype))
            for row, expected in enumerate(whole):
                for mine in ranks:
                    assert torch.equal(mine[row], ranks[0][row])
                    assert float((mine[row] - expected).abs().max()) <= tolerance * float(expected.std()), (size, dtype)


@pytest.mark.parametrize(
    ("name", "quantization"), [("llama-6-heads", "int8"), ("llama-6-heads", "fp8"), ("gptj", "int8")]
)
def test_quantised_weights_are_those_of_the_whole(name: str, quantization: str, made: Any) -> None:
    checkpoint = made(name)
    options: Any = {"dtype": torch.float64, "quantization": quantization}
    whole = logits(checkpoint, Group(), **options)
    for size in (2, 3):
        if divides(checkpoint.config, size):
            for mine in on_ranks(size, lambda group: logits(checkpoint, group, **options)):
                for a, b in zip(mine, whole):
                    assert float((a - b).abs().max()) <= 1e-10 * float(b.std())


def test_dummy_weights_are_those_of_the_whole(made: Any) -> None:
    checkpoint = made("gptj")
    options: Any = {"dtype": torch.float64, "load_format": "dummy"}
    whole = logits(checkpoint, Group(), **options)
    for mine in on_ranks(2, lambda group: logits(checkpoint, group, **options)):
        for a, b in zip(mine, whole):
            assert float((a - b).abs().max()) <= 1e-10 * float(b.std())


def test_a_rank_reads_only_its_part(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    original = files._read_bytes

    def count(stored: Any, offset: int, view: memoryview) -> None:
        nonlocal read
        read += len(view)
        original(stored, offset, view)

    monkeypatch.setattr(files, "_read_bytes", count)
    for name in ("llama-gqa", "gpt2", "neox", "gptj"):
        checkpoint = made(name)
        read = 0
        checkpoint.load()
        whole, read = read, 0
        checkpoint.load(group=Group(1, 2))
        assert read < 0.65 * whole, name  # norms, positions and biases of outputs are read by all


def test_ordered_sums_are_equal_alone_and_fused(made: Any) -> None:
    """batch_invariant with more than two ranks: partial sums are added by rank, whatever shares the step."""
    checkpoint = made("llama-6-heads")

    def run(group: Group) -> tuple[list[Tensor], list[Tensor]]:
        fused = RankDriver(checkpoint, group, batch_invariant=True).prefill()
        alone = RankDriver(checkpoint, group, batch_invariant=True).prefill(lambda left: 3)
        return fused, alone

    for fused, alone in on_ranks(3, run, ordered=True):
        assert all(torch.equal(a, b) for a, b in zip(fused, alone))


def test_sizes_that_do_not_divide_are_refused(made: Any) -> None:
    config = made("llama-6-heads").config
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide .* 6 heads and 3 KV heads; 1, 3, 6"):
        check_ranks(config, 4)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_best_of_the_parts_is_the_best_of_all(size: int) -> None:
    """The reduced draw: equal to that of one rank, at ties and where a row is not finite, greedy and random."""
    vocab, rows = 101, 6
    torch.manual_seed(size)
    scores = torch.randn(rows, vocab)
    scores[1, [40, 80]] = 9.0  # a tie between ranks
    scores[2, 90] = float("nan")
    scores[3] = float("-inf")
    scores[3, 100] = 1.0
    scores[4] = float("-inf")
    sampling = [RowSampling(seed=i, temperature=0.0 if i % 2 else 0.9) for i in range(rows)]

    def draw(group: Group) -> tuple[list[int], list[bool]]:
        sampler = Sampler(rows, vocab, torch.device("cpu"), group=group)
        sampler.join(list(range(rows)), sampling, [0] * rows, [[]] * rows, [[]] * rows)
        begin, end = sampler.part.ranges[0]
        mine = torch.cat((scores[:, begin:end], torch.full((rows, sampler.part.padding), 1e9)), 1)
        output = sampler.sample(mine, torch.arange(rows))
        return output.token_ids.tolist(), output.finite.tolist()

    assert ops.gumbel(vocab, *torch.zeros(3, 1, dtype=torch.int64))[0, 28:56].equal(
        ops.gumbel(28, *torch.zeros(3, 1, dtype=torch.int64), first=28)[0]
    )
    expected = draw(Group())
    assert all(drawn == expected for drawn in on_ranks(size, draw))
