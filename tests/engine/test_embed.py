"""Embeddings: the pooled last hidden states are transformers', whatever the chunks and preemptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel

from flover import LLM, SamplingParams

PROMPTS = ["In the beginning", "And it came to pass, " * 20, "Moses"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 16, "num_kv_blocks": 14, "max_model_len": 160}])
def test_as_transformers(pooling: str, options: dict[str, int]) -> None:
    with LLM(num_threads=1, **options) as llm:
        folder = llm.engine.folder
        first = llm.embed(PROMPTS, pooling=pooling)
        again = llm.embed(PROMPTS, pooling=pooling)  # nothing is taken from the prefix cache
    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    for output, second in zip(first, again):
        with torch.inference_mode():
            hidden = model(torch.tensor([output.prompt_token_ids])).last_hidden_state[0]
        wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
        wanted = wanted / wanted.norm()
        assert output.embedding is not None
        assert np.allclose(output.embedding, wanted.numpy(), atol=1e-5)
        assert np.allclose(output.embedding, second.embedding or [], atol=1e-6)


def test_beside_generation() -> None:
    with LLM(num_threads=1) as llm:
        engine = llm.engine
        alone = llm.embed(PROMPTS[1])[0].embedding
        greedy = SamplingParams(temperature=0, max_tokens=8)
        text = llm.generate("In the", greedy)[0].outputs[0].text
        engine.add_request("text", "In the", greedy)
        engine.add(engine.prepare("vector", PROMPTS[1], SamplingParams(max_tokens=1), pooling="last"))
        done = {}
        while engine.has_unfinished_requests():
            done.update({output.request_id: output for output in engine.step() if output.finished})
        assert done["text"].outputs[0].text == text
        assert np.allclose(done["vector"].embedding or [], alone or [], atol=1e-5)
        assert done["text"].embedding is None
        with pytest.raises(ValueError, match="pooling must be last or mean"):
            llm.embed("x", pooling="max")
