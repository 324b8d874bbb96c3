"""What each low-precision setting costs in quality: logits and perplexity against fp32, on the built-in models.

    python benchmarks/quality.py        # a few minutes on 2 cores; writes benchmarks/results/quality.json

Text: 18 chapters that the built-in models were not trained on, data/kjv_test.txt (those of under 3,000 bytes among the
test chapters that scripts/train_builtin.py cuts out of Debian's bible-kjv-text). Teacher-forced: each chapter is a
prompt behind the end-of-text token, up to the model's context. Logit errors are divided by the standard deviation of
the fp32 logits; same_top is the share of positions where both put the same token first.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flover import LLM, SamplingParams
from flover.bench.keep import provenance

HERE = Path(__file__).parent
TEXT, RESULT = HERE / "data" / "kjv_test.txt", HERE / "results" / "quality.json"
MODELS = ("kjv-llama", "kjv-gpt2")
BASELINE: Mapping[str, Any] = {"dtype": "float32"}
SETTINGS: Sequence[Mapping[str, Any]] = (  # of EngineConfig
    {"dtype": "bfloat16"},
    {"dtype": "float32", "quantization": "int8"},
    {"dtype": "float32", "quantization": "fp8"},
    {"dtype": "float32", "quantization": "int8_w8a8"},
    {"dtype": "float32", "quantization": "fp8_w8a8"},
    {"dtype": "float32", "kv_cache_dtype": "fp8"},
)


class Reading(NamedTuple):
    """What a model makes of the text: logits before every token but the first, and the tokens' log-probabilities."""

    logits: Tensor  # [num_tokens, vocab_size] fp32
    logprobs: list[float]


def read(model: str, settings: Mapping[str, Any], chapters: Sequence[str]) -> Reading:
    """The chapters through the engine, one at a time, each in one step so that its logits come in order."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    logits: list[Tensor] = []
    logprobs: list[float] = []
    with LLM(model, max_num_seqs=1, enable_prefix_caching=False, **settings) as llm:
        runner = llm.engine.core._executor._runner  # type: ignore[attr-defined]
        limit = llm.engine.core.resolved.scheduler.max_model_len - 1
        tokenizer = llm.engine.tokenizer
        assert tokenizer is not None
        compute = runner.model.compute_logits
        seen: list[Tensor] = []

        def watched(hidden: Tensor) -> Tensor:
            out: Tensor = compute(hidden)
            seen.append(out.float().cpu())
            return out

        runner.model.compute_logits = watched
        for chapter in chapters:
            ids = [0, *tokenizer.encode(chapter)][:limit]
            seen.clear()
            out = llm.generate({"prompt_token_ids": ids}, params)[0]
            logits.append(torch.cat(seen)[: len(ids) - 1])
            assert out.prompt_logprobs is not None
            logprobs += [entry[token].logprob for token, entry in zip(ids, out.prompt_logprobs) if entry]
    return Reading(torch.cat(logits), logprobs)


def compare(ours: Reading, exact: Reading) -> dict[str, float]:
    assert ours.logits.shape == exact.logits.shape
    assert len(ours.logprobs) == len(exact.logprobs) == len(ours.logits)
    error = (ours.logits - exact.logits).double() / exact.logits.double().std()
    return {
        "logit_error_max": float(error.abs().max()),
        "logit_error_rms": float(error.square().mean().sqrt()),
        "same_top": float((ours.logits.argmax(-1) == exact.logits.argmax(-1)).double().mean()),
        "perplexity": perplexity(ours),
        "perplexity_change": perplexity(ours) / perplexity(exact) - 1,
    }


def perplexity(reading: Reading) -> float:
    return math.exp(-math.fsum(reading.logprobs) / len(reading.logprobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--settings", type=json.loads, default=list(SETTINGS), help="a JSON list of EngineConfig fields"
    )
    parser.add_argument("--chapters", type=int, help="only the first so many")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    chapters = TEXT.read_text(encoding="utf-8").strip().split("\n\n")[: args.chapters]
    made_by = provenance("cuda" if torch.cuda.is_available() else "cpu", script=True)
    result: dict[str, Any] = {"environment": made_by, "chapters": len(chapters), "models": {}}
    for model in args.models.split(","):
        exact = read(model, BASELINE, chapters)
        rows = []
        print(f"{model}: {len(exact.logprobs)} tokens, fp32 perplexity {perplexity(exact):.4f}")
        print(f"{'setting':36}{'logits max':>11}{'rms':>9}{'same top':>10}{'perplexity':>12}{'change':>9}")
        for settings in args.settings:
            row = compare(read(model, settings, chapters), exact)
            rows.append({"settings": settings, **row})
            name = " ".join(f"{v} KV" if k == "kv_cache_dtype" else str(v) for k, v in settings.items())
            print(
                f"{name:36}{row['logit_error_max']:11.4f}{row['logit_error_rms']:9.4f}{row['same_top']:10.2%}"
                f"{row['perplexity']:12.4f}{row['perplexity_change']:+9.3%}",
                flush=True,
            )
        result["models"][model] = {"tokens": len(exact.logprobs), "perplexity": perplexity(exact), "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
