"""The built-in models: transformers loads the same folders and agrees token for token; the cards say what is true."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flover import LLM, SamplingParams
from flover.models.loader import resolve_model

PROMPTS = ["In the beginning", "And the LORD said unto Moses,", "Blessed are", "The sons of", "Verily I say", "\n"]
NAMES = ["kjv-llama", "kjv-gpt2"]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_agrees_token_for_token(name: str) -> None:
    folder = resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with LLM(name, dtype="float32", device="cpu") as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
    for prompt, output in zip(PROMPTS, outputs):
        ids = tokenizer(prompt, return_tensors="pt")
        assert output.prompt_token_ids == ids["input_ids"][0].tolist()
        expected = model.generate(
            **ids, max_new_tokens=48, min_new_tokens=48, do_sample=False, temperature=None, top_p=None
        )
        assert output.outputs[0].token_ids == expected[0, ids["input_ids"].shape[1] :].tolist(), prompt
        assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_small_and_complete(name: str) -> None:
    folder = resolve_model(name)
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert "perplexity" in card
    assert (folder / "loss.png").exists()
    assert training
    with LLM(name, device="cpu") as llm:
        assert (
            llm.chat([{"role": "user", "content": "In the beginning"}], SamplingParams(max_tokens=4))[0].outputs[0].text
        )
