"""What the parts of gpu.py share: models of true shape with random weights, an engine, and the clock around it."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flover.bench.engines import EngineSystem
from flover.bench.records import Job, Run
from flover.bound import Bound, Limits
from flover.config import EngineConfig
from flover.startup import settle


def llama(hidden: int, size: int, layers: int, heads: int, kv_heads: int, vocab: int, length: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }


MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": llama(4096, 14336, 32, 32, 8, 128256, 8192),
    "llama2-7b": llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-13b": llama(5120, 13824, 40, 40, 40, 32000, 2048),
    "llama-65b": llama(8192, 22016, 80, 64, 64, 32000, 2048),
    "gptj-6b": {
        "architectures": ["GPTJForCausalLM"],
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "vocab_size": 50400,
    },
    "gpt2-xl": {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "n_positions": 1024,
        "vocab_size": 50257,
        "tie_word_embeddings": True,
    },
    "tiny": llama(128, 256, 2, 4, 2, 1000, 4096),
}


class Engine:
    """The engine with random weights (`bench.engines`), its bound, and jobs of given lengths."""

    def __init__(self, path: Path, limits: Limits, settings: dict[str, Any]) -> None:
        started = time.perf_counter()
        config = EngineConfig(str(path), load_format="dummy", enable_prefix_caching=False, **settings)
        self.system = EngineSystem("fused", config)
        self.core = self.system.core
        self.start_up = time.perf_counter() - started
        self.core.warm_up()
        settle()  # as the engine's process does
        self.settings = settings
        self._rng = random.Random(0)
        self.bound = Bound(self.core, limits)
        self.max_model_len = self.core.resolved.scheduler.max_model_len

    def run(self, lengths: Sequence[tuple[int, int]], arrivals: Sequence[float] = ()) -> Run:
        """Serve prompts of random ids; `duration` is from the first arrival to the last token.

        Args:
            lengths: prompt and output tokens of each. arrivals: ascending, seconds; none: all at once.
        """
        vocab, due = self.core.resolved.model.vocab_size, list(arrivals) or [0.0] * len(lengths)
        jobs = [Job(at, tuple(self._rng.randrange(vocab) for _ in range(n)), m) for at, (n, m) in zip(due, lengths)]
        run = self.system.run(jobs)
        errors = [record.error for record in run.records if record.error]
        if errors:
            raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
        return run

    def close(self) -> None:
        """Give the memory back: another engine may be started."""
        del self.core
        gc.unfreeze()
        self.system.close()


class Bench:
    """One engine at a time, made when a part asks for settings that the present one does not have.

    Args:
        given: settings of the command line, for every engine. scale: lengths and numbers of requests are divided by
            it, for a run that only shows that all parts work.
    """

    def __init__(self, name: str, folder: Path, limits: Limits, given: dict[str, Any], scale: int = 1) -> None:
        self.name, self.limits, self.given, self.scale = name, limits, given, scale
        self._path = folder / name
        self._path.mkdir(exist_ok=True)
        (self._path / "config.json").write_text(json.dumps({**MODELS[name], "dtype": "bfloat16"}))
        self._engine: Engine | None = None
        self.positions = int(MODELS[name].get("n_positions", MODELS[name].get("max_position_embeddings")))

    def engine(self, **settings: Any) -> Engine:
        """The engine of these settings on top of the usual ones; any other is closed."""
        usual = {"max_model_len": min(2048, self.positions), "max_num_seqs": 256, "max_num_batched_tokens": 8192}
        wanted = {**usual, **self.given, **settings}
        if self._engine is None or self._engine.settings != wanted:
            self.close()
            self._engine = Engine(self._path, self.limits, wanted)
        return self._engine

    def small(self, value: int, least: int = 1) -> int:
        """A length or a count, at the scale of this run."""
        return max(least, value // self.scale)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
