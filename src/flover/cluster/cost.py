"""The cost model: seconds of a step and bytes of memory from bytes, FLOPs and link speeds. No torch.

A step is one formula, whatever it holds (prefill and decode may share it). Per layer
    (t_bytes^p + t_flops^p)^(1/p) + KV read + two all-reduces + overhead,
where t_bytes reads the layer's weights once and t_flops is 2 x parameters x tokens. Tensor parallelism divides
parameters, KV heads and FLOPs by its ranks (KV heads are copied where there are fewer); pipeline stages hold
ceil(layers / stages) and work on one micro-batch of rows each. `Efficiency` makes seconds of datasheet rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from flover.cluster.hardware import Device
from flover.model_config import ModelConfig
from flover.sharding import check_ranks, local_kv_heads

EIGHT_BIT = ("fp8", "int8")


class Weights(NamedTuple):
    """Of a part of a model: bytes once loaded, and parameters."""

    num_bytes: int
    parameters: int


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A model as the cost model sees it.

    Args:
        layer: one block. head: output projection with the final norm, read at each step. embedding: tables of which a
            step reads a few rows (nothing where the head is the same tensor).
        kv_dtype_bytes: of a cached element. dtype: of the products.
    """

    config: ModelConfig
    layer: Weights
    head: Weights
    embedding: Weights
    dtype: str
    activation_bytes: int
    kv_dtype_bytes: int

    def kv_bytes(self, context: float, tp: int, layers: int) -> float:
        """Live KV of one row on one rank, in the first `layers` layers."""
        token = 2 * local_kv_heads(self.config, tp) * self.config.head_dim * self.kv_dtype_bytes
        windows = (self.config.sliding_window(i) for i in range(layers))
        return token * sum(min(context, window or context) for window in windows)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step computes. rows: that decode. kv_tokens: tokens of context they read, over all rows. prefill: prompt
    tokens. pairs: (query, key) pairs of their attention. ending: prompts that end in it, and sample.
    """

    rows: float = 0
    kv_tokens: float = 0
    prefill: float = 0
    pairs: float = 0
    ending: float = 0


class Memory(NamedTuple):
    """Bytes on the fullest rank. step: an estimate of the largest step's activations."""

    device: float
    weights: float
    step: float
    kv_token: float

    def rows(self, context: int, share: float) -> int:
        """Requests of `context` tokens that fit beside weights and step within a share of the device."""
        return max(0, int(self.room(share) // (context * self.kv_token)))

    def room(self, share: float) -> float:
        return self.device * share - self.weights - self.step


@dataclass(frozen=True, slots=True)
class Cost:
    """A model on `tp` x `pp` devices.

    Raises:
        ValueError: sizes that do not divide, saying which do.
    """

    model: ModelCost
    device: Device
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        config = self.model.config
        for name, value in (("tp", self.tp), ("pp", self.pp)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_ranks(config, self.tp)
        if self.pp > config.num_layers:
            raise ValueError(f"pp={self.pp} is more than the {config.num_layers} layers")
        self.device.rate(self.model.dtype)

    # ---- time --------------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> float:
        """Seconds until every row of a step has its token: pp micro-batches, each through pp stages."""
        part = Batch(*(getattr(batch, name) / self.pp for name in Batch.__slots__))
        return self.pp * (self._stage(part) + self._send(part.rows + part.prefill))

    def decode(self, rows: int, context: float) -> float:
        """Seconds of a decode step of `rows` rows at that context."""
        return self.step(Batch(rows=rows, kv_tokens=rows * context))

    def prefill(self, length: int, chunk: int = 2048) -> float:
        """Seconds of one prompt alone, from schedule to first token: chunks follow each other through the stages."""
        seconds, done = 0.0, 0
        while done < length:
            tokens = min(chunk, length - done)
            pairs = tokens * (done + (tokens + 1) / 2)
            stage = self._stage(Batch(prefill=tokens, pairs=pairs, ending=float(done + tokens == length)))
            seconds += (stage + self._send(tokens)) * (self.pp if done + tokens == length else 1)
            done += tokens
        return seconds

    def _stage(self, batch: Batch) -> float:
        """The last stage, which has the head."""
        model, hardware, e = self.model, self.device, self.device.efficiency
        layers, tokens = self.layers, batch.rows + batch.prefill
        share = e.eight_bit if model.dtype in EIGHT_BIT else 1.0
        rate = hardware.rate(model.dtype) * e.flops * share * self.tp
        read = hardware.bandwidth * e.weights * share * self.tp
        sampled = batch.rows + batch.ending

        def product(weights: Weights, count: float) -> float:
            by_bytes, by_flops = weights.num_bytes / read, 2 * weights.parameters * count / rate
            return float((by_bytes**e.softness + by_flops**e.softness) ** (1 / e.softness))

        context = batch.kv_tokens / batch.rows if batch.rows else 0
        kv = batch.rows * model.kv_bytes(context, self.tp, layers) / (hardware.bandwidth * e.kv)
        attention = 4 * layers * model.config.num_heads * model.config.head_dim * batch.pairs / rate
        reduced = 2 * layers * self.all_reduce(tokens * model.config.hidden_size * model.activation_bytes)
        seconds = layers * product(model.layer, tokens) + kv + attention + reduced
        if sampled:
            seconds += product(model.head, sampled)
        return seconds + layers * e.layer + e.row * sampled + e.step

    def all_reduce(self, num_bytes: float) -> float:
        """Seconds of a sum over the tp ranks: one shot (everyone reads all) or a ring, whichever is quicker.

        A group that does not fit one node goes over the network.
        """
        n = self.tp
        if n == 1:
            return 0.0
        link = self.device.node if n <= self.device.per_node else self.device.network
        rate = link.bandwidth * self.device.efficiency.link
        one_shot = link.latency + (n - 2) * link.hop + (n - 1) * num_bytes / rate
        ring = (n - 1) * link.latency + 2 * (n - 1) / n * num_bytes / rate
        return min(one_shot, ring)

    def _send(self, tokens: float) -> float:
        """Hidden states to the next stage."""
        if self.pp == 1:
            return 0.0
        link = self.device.node if self.tp * self.pp <= self.device.per_node else self.device.network
        share = tokens * self.model.config.hidden_size * self.model.activation_bytes / self.tp
        return link.latency + share / (link.bandwidth * self.device.efficiency.link)

    # ---- memory ------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """Of the fullest stage."""
        return -(-self.model.config.num_layers // self.pp)

    def memory(self, tokens: int = 2048, rows: int = 256) -> Memory:
        """Of the fullest rank, for steps of so many tokens and rows."""
        model, config = self.model, self.model.config
        ends = (model.head, model.embedding)
        ends_bytes = sum(w.num_bytes for w in ends) if self.pp == 1 else max(w.num_bytes for w in ends)
        # residual, norm and attention's input and output whole; the widest product sharded; fp32 logits of a shard
        widest = max(4 * config.hidden_size, model.layer.parameters // config.hidden_size) / self.tp
        step = tokens * (4 * config.hidden_size + widest) * model.activation_bytes
        step += 2 * rows * config.vocab_size * 4 / self.tp
        return Memory(
            self.device.memory_bytes,
            (self.layers * model.layer.num_bytes + ends_bytes) / self.tp,
            step,
            model.kv_bytes(1, self.tp, self.layers),
        )


def product_dtype(dtype: str, quantization: str) -> str:
    """The dtype that products are computed in."""
    return quantization.partition("_")[0] if quantization.endswith("w8a8") else dtype
