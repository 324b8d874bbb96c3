"""Tiny random checkpoints of every family, and a driver of flover modules: rows, chunks, both layouts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from flover.kernels.reference.attention import AttentionMetadata
from flover.layers.attention import ForwardContext
from flover.model_config import ModelConfig
from flover.models.loader import load_model

MAX_TOKENS = 64  # per row
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 12,
    "rope_theta": 100.0,
}


@dataclass(frozen=True)
class Case:
    """A family's class and what its config says beside the common sizes."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    stored_dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"


def _decoder(**settings: Any) -> dict[str, Any]:
    return {
        "num_key_value_heads": 2,
        "intermediate_size": 56,
        "max_position_embeddings": MAX_TOKENS,
        **settings,
    }


CASES: dict[str, Case] = {
    "llama-gqa": Case("Llama", _decoder(head_dim=20)),
    "llama-tied-biases": Case(
        "Llama",
        _decoder(num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, vocab_size=97),
    ),
    "llama-mqa-gelu": Case("Llama", _decoder(num_key_value_heads=1, hidden_act="gelu", rms_norm_eps=1e-5)),
    "llama-rope-llama3": Case("Llama", _decoder(rope_parameters=LLAMA3)),
    "llama-rope-linear": Case(
        "Llama", _decoder(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0})
    ),
    "llama-rope-dynamic": Case(
        "Llama",
        _decoder(
            max_position_embeddings=10,
            rope_parameters={"rope_type": "dynamic", "factor": 2.5, "rope_theta": 300.0},
        ),
    ),
    "llama-sharded": Case("Llama", _decoder(), max_shard_size="20KB"),
    "llama-fp16": Case("Llama", _decoder(), torch.float16),
    "llama-bf16": Case("Llama", _decoder(tie_word_embeddings=True), torch.bfloat16),
    "mistral-window": Case("Mistral", _decoder(sliding_window=7, head_dim=16)),
    "mistral-full": Case("Mistral", _decoder(sliding_window=None)),
    "qwen2": Case("Qwen2", _decoder(tie_word_embeddings=True)),
    "qwen2-window": Case("Qwen2", _decoder(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": Case("Qwen3", _decoder(head_dim=16)),
    "qwen3-window-biases": Case(
        "Qwen3",
        _decoder(head_dim=8, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    ),
    "gemma2": Case(
        "Gemma2",
        _decoder(head_dim=16, sliding_window=6, query_pre_attn_scalar=10, attn_logit_softcapping=3.0),
    ),
    "gemma2-no-caps": Case(
        "Gemma2",
        _decoder(head_dim=12, sliding_window=50, attn_logit_softcapping=None, final_logit_softcapping=None),
    ),
    "gemma3": Case(
        "Gemma3",
        _decoder(
            head_dim=16,
            query_pre_attn_scalar=10,
            sliding_window=6,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        ),
    ),
    "gpt2": Case("GPT2", {"n_positions": MAX_TOKENS}),
    "gpt2-scaled": Case(
        "GPT2",
        {
            "n_positions": MAX_TOKENS,
            "n_inner": 52,
            "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": False,
            "activation_function": "relu",
            "tie_word_embeddings": False,
            "reorder_and_upcast_attn": True,
        },
    ),
    "gpt2-bf16-sharded": Case("GPT2", {"n_positions": MAX_TOKENS}, torch.bfloat16, "20KB"),
    "gptj": Case("GPTJ", {"n_positions": MAX_TOKENS, "rotary_dim": 4}),
    "gptj-full-rotary-tied": Case(
        "GPTJ", {"n_positions": MAX_TOKENS, "rotary_dim": 12, "n_inner": 44, "tie_word_embeddings": True}
    ),
    "neox": Case(
        "GPTNeoX",
        {
            "intermediate_size": 60,
            "max_position_embeddings": MAX_TOKENS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.34},
        },
    ),
    "neox-serial": Case(
        "GPTNeoX",
        {
            "intermediate_size": 60,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "max_position_embeddings": MAX_TOKENS,
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "opt": Case("OPT", {"ffn_dim": 60, "max_position_embeddings": MAX_TOKENS}),
    "opt-350m": Case(
        "OPT",
        {
            "ffn_dim": 60,
            "max_position_embeddings": MAX_TOKENS,
            "do_layer_norm_before": False,
            "word_embed_proj_dim": 28,
            "activation_function": "gelu",
        },
    ),
    "opt-bare": Case(
        "OPT",
        {
            "ffn_dim": 60,
            "max_position_embeddings": MAX_TOKENS,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "tie_word_embeddings": False,
        },
    ),
    "bloom": Case("Bloom", {}),
    "bloom-6-heads": Case("Bloom", {"n_head": 6, "apply_residual_connection_post_layernorm": True}),
    "bloom-3-heads": Case("Bloom", {"n_head": 3, "tie_word_embeddings": False}),
}


def hf_config(case: Case) -> Any:
    cls = getattr(transformers, f"{case.family}TextConfig", None) or getattr(transformers, f"{case.family}Config")
    head = f"{case.family}LMHeadModel" if case.family == "GPT2" else f"{case.family}ForCausalLM"
    common = {
        "vocab_size": 101,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "init_std": 0.2,
        "architectures": [head],
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    renamed = {new: common.pop(old) for old, new in cls.attribute_map.items() if old in common}
    return cls(**{**common, **renamed, **case.settings})


def build(case: Case, folder: Path) -> Any:
    """A transformers model with every parameter random, saved to the folder; returned in fp32."""
    torch.manual_seed(sum(map(ord, str(case))))
    config = hf_config(case)
    family = getattr(transformers, config.architectures[0])
    model = family(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(case.stored_dtype).save_pretrained(folder, max_shard_size=case.max_shard_size)
    return reference(folder, torch.float32)


def reference(folder: Path, dtype: torch.dtype) -> Any:
    """The folder as transformers loads it (`model.to(dtype)` would also round the rope frequencies)."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@dataclass
class Checkpoint:
    case: Case
    folder: Path
    hf: Any  # transformers' model of it, in fp32

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_folder(self.folder)

    def load(self, **options: Any) -> nn.Module:
        settings: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", **options}
        return load_model(self.folder, self.config, **settings)

    def _reset_rope(self) -> None:
        """transformers keeps the longest length it has seen; each request of ours stands for itself."""
        rotary = getattr(self.hf.base_model, "rotary_emb", None)
        if hasattr(rotary, "max_seq_len_cached"):
            rotary.max_seq_len_cached = 1

    def hf_logits(self, prompt: list[int]) -> Tensor:
        self._reset_rope()
        with torch.inference_mode():
            logits: Tensor = self.hf(torch.tensor([prompt])).logits[0]
        return logits

    def hf_greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        self._reset_rope()
        with torch.inference_mode():
            out = self.hf.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens


class Driver:
    """Rows over one KV cache, poisoned with NaN and handed out in shuffled order, in a slab or in blocks."""

    def __init__(
        self,
        module: Any,
        config: ModelConfig,
        prompts: list[list[int]],
        layout: str,
        batch_invariant: bool = False,
    ) -> None:
        self.module, self.config, self.batch_invariant = module, config, batch_invariant
        self.tokens = [list(p) for p in prompts]
        self.prompt_lens = [len(p) for p in prompts]
        self.computed = [0] * len(prompts)
        self.contiguous = layout == "slab"
        self.block_size = MAX_TOKENS if self.contiguous else 4
        per_row = MAX_TOKENS // self.block_size
        order = list(range((len(prompts) + 2) * per_row))
        random.Random(len(order)).shuffle(order)
        self.blocks = [torch.tensor(order[i * per_row : (i + 1) * per_row]) for i in range(len(prompts))]
        shape = (len(order) * self.block_size, config.num_kv_heads, config.head_dim)
        dtype = next(module.parameters()).dtype
        self.k = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(config.num_layers)]
        self.v = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(config.num_layers)]
        self.shift = 0  # mutation: added to the positions of every chunk but the first

    def step(self, counts: list[int]) -> list[Tensor]:
        """Run `counts[row]` more tokens of each row in one call; logits of each of them."""
        rows = [row for row, count in enumerate(counts) if count]
        ids, positions, slots, prompt_lens, starts = [], [], [], [], [0]
        for row in rows:
            begin, end = self.computed[row], self.computed[row] + counts[row]
            shift = self.shift if begin else 0
            ids += self.tokens[row][begin:end]
            positions += range(begin + shift, end + shift)
            table = self.blocks[row].tolist()
            slots += [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(begin, end)]
            prompt_lens += [self.prompt_lens[row]] * counts[row]
            starts.append(len(ids))
            self.computed[row] = end
        seq_lens = [self.computed[row] for row in rows]
        blocks = [self.blocks[row][: -(-n // self.block_size)] for row, n in zip(rows, seq_lens)]
        meta = AttentionMetadata(starts, seq_lens, blocks, self.block_size, self.contiguous)
        ctx = ForwardContext(self.k, self.v, torch.tensor(slots), torch.tensor(prompt_lens), meta, self.batch_invariant)
        with torch.inference_mode():
            hidden = self.module(torch.tensor(ids), torch.tensor(positions), ctx)
            logits: Tensor = self.module.compute_logits(hidden)
        parts = dict(zip(rows, logits.split([counts[row] for row in rows])))
        return [parts.get(row, logits[:0]) for row in range(len(counts))]

    def prefill(self, chunk: Callable[[int], int] | None = None) -> list[Tensor]:
        """Logits of every prompt position per row; `chunk(left)`: tokens that a row gets in a step."""
        out: list[list[Tensor]] = [[] for _ in self.tokens]
        while any(left := [n - c for n, c in zip(self.prompt_lens, self.computed)]):
            counts = [n if chunk is None else min(n, chunk(n)) for n in left]
            if not any(counts):
                continue
            for row, part in enumerate(self.step(counts)):
                out[row].append(part)
        return [torch.cat(parts) for parts in out]

    def greedy(self, num_tokens: int) -> list[list[int]]:
        """Prefill, then decode all rows together."""
        last = [logits[-1] for logits in self.prefill()]
        for i in range(num_tokens):
            for row, logits in enumerate(last):
                self.tokens[row].append(int(logits.argmax()))
            if i < num_tokens - 1:
                last = [part[-1] for part in self.step([1] * len(self.tokens))]
        return [t[n:] for t, n in zip(self.tokens, self.prompt_lens)]


def checkpoints(cases: Mapping[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A case's checkpoint by name, each made once."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = Checkpoint(cases[name], folder, build(cases[name], folder))
        return made[name]

    return get


def random_prompts(vocab_size: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


def uneven(seed: int = 0) -> Callable[[int], int]:
    """A chunk size for `Driver.prefill`: 1 to 9 tokens, sometimes none of a row in a step."""
    rng = random.Random(seed)
    return lambda left: rng.choice((0, 1, 1, 2, 3, 5, 9))


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
