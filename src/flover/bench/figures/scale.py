"""How large the figures are run: `FULL` is the paper's, `TINY` the same shape of workload on a CPU in two minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from flover.model_config import ModelConfig

Shape = dict[str, Any]  # a config.json


class Gap(NamedTuple):
    """Seconds between arrivals: absolute, or as a share of the time that a single request takes here."""

    label: str
    seconds: float = 0.0
    share: float = 0.0

    def of(self, single: float) -> float:
        return self.seconds + self.share * single


def _llama(hidden: int, size: int, layers: int, heads: int, vocab: int = 32000, length: int = 2048) -> Shape:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }


def _gptj(hidden: int, layers: int, heads: int, rotary: int, vocab: int = 50400, length: int = 2048) -> Shape:
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": length,
        "rotary_dim": rotary,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    }


SHAPES: Mapping[str, Shape] = {  # 65B with its true intermediate size; the release has 11008, that of 7B
    "gptj-6b": _gptj(4096, 28, 16, 64),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
}
TINY_SHAPES: Mapping[str, Shape] = {
    "gptj-6b": _gptj(64, 2, 4, 16, 512, 256),
    "llama-13b": _llama(64, 160, 2, 4, 512, 256),
}


@dataclass(frozen=True, slots=True)
class Scale:
    """The sizes of every figure. Models go by the paper's names at any scale; `shapes` says what is run for each.

    Args:
        absolute: also run the paper's intervals in seconds, not only those scaled by the single-request time.
        draws: of each Poisson gap. repeats: of the random lengths, each with a seed of its own.
        upper: upper bounds of the output lengths, by number of requests; the lower bound is `lower`.
        tp: upper bound and numbers of requests of the figure with tensor parallelism.
        runs: of each workload, of which the fastest counts: short runs are noisy.
        threads: of the engine on a CPU; more only get in each other's way where a model is tiny.
        serial: of how many requests serial is measured, where fewer than the most will do: they are of one length.
        processes: with weights of their own, at most, or as many as fit; 0: none.
        lens: maximum lengths of the reorder study. slots: its numbers of slots; traces: random ones of each length.
    """

    name: str
    shapes: Mapping[str, Shape]
    dtype: str
    num_prompt: int
    num_output: int
    requests: tuple[int, ...]
    absolute: bool
    draws: int
    repeats: int
    poisson_ms: tuple[int, ...]
    fixed_requests: tuple[int, ...]
    fixed_batches: tuple[int, ...]
    lower: int
    upper: Mapping[int, tuple[int, ...]]
    tp: tuple[int, tuple[int, ...]]
    lens: tuple[int, ...]
    slots: tuple[int, ...]
    traces: int
    serial: Mapping[str, int]
    processes: int
    threads: int | None = None
    runs: int = 1

    @property
    def limit(self) -> int:
        """Tokens of the longest request of the figures 4, progress, 8 and fixed."""
        return self.num_prompt + self.num_output


FULL = Scale(
    name="full",
    shapes=SHAPES,
    dtype="bfloat16",
    num_prompt=8,
    num_output=504,
    requests=(1, 2, 4, 8, 16, 32),
    absolute=True,
    draws=20,
    repeats=1,
    poisson_ms=(20, 50, 100, 150, 200, 300, 400, 500, 750, 1000, 2000, 3000, 4000, 5000),
    fixed_requests=(1, 2, 4, 8),
    fixed_batches=(1, 2, 4),
    lower=128,
    upper={32: (256, 384, 512, 768, 1024, 1280, 1536, 1792), 16: (256, 384, 512, 768, 1024, 1280, 1536, 1792)},
    tp=(1000, (16, 32, 48)),
    lens=(512, 1024, 1536, 2048),
    slots=(32, 64, 128, 256, 512, 1024, 2048, 4096),
    traces=100,
    serial={"llama-33b": 8, "llama-65b": 4},
    processes=8,
)
TINY = Scale(
    name="tiny",
    shapes=TINY_SHAPES,
    dtype="float32",
    num_prompt=8,
    num_output=32,
    requests=(1, 2, 4, 8),
    absolute=False,
    draws=3,
    repeats=2,
    poisson_ms=(20, 200, 1000, 5000),
    fixed_requests=(1, 2, 4),
    fixed_batches=(1, 2),
    lower=8,
    upper={8: (16, 48, 112), 4: (16, 112)},
    tp=(64, (4, 8)),
    lens=(512, 1024, 1536, 2048),
    slots=(32, 128, 1024, 4096),
    traces=20,
    serial={},
    processes=2,
    threads=1,
    runs=3,
)
SCALES: Mapping[str, Scale] = {scale.name: scale for scale in (TINY, FULL)}


class Bytes(NamedTuple):
    """What a decode step must read: the weights but for the token embedding, and keys and values of live tokens."""

    weights: float
    kv_per_token: float

    @classmethod
    def of(cls, shape: Shape, dtype_bytes: int, weights: int) -> Bytes:
        """weights: bytes of all of them, as `models.loader.weight_bytes` gives them."""
        model = ModelConfig.from_dict(shape)
        return cls(
            weights - model.vocab_size * model.hidden_size * dtype_bytes, model.kv_elements_per_token * dtype_bytes
        )

    def step(self, tokens: float) -> float:
        """Of a step over rows that hold so many tokens together; without rows nothing is read."""
        return self.weights + tokens * self.kv_per_token

    def request(self, num_prompt: int, num_output: int) -> float:
        """Of one request alone: a step per output token."""
        return num_output * self.step(num_prompt + (num_output - 1) / 2)
