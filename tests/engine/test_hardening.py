"""What a sceptical user broke once: bad input that reached the engine, and scores that outlived a preemption."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import echo_folder

from flover import LLM, EngineConfig, LLMEngine, SamplingParams
from flover.cli import main
from flover.config import Hardware
from flover.engine.batch import BatchPlan, Scores, StepResult
from flover.engine.step import Step, take_in
from flover.metrics import StepStats
from flover.request import Request, RequestStatus, RowSampling


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(device="cpu", max_num_seqs=8) as llm:
        yield llm


def finished(engine: LLMEngine) -> dict[str, Any]:
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_salt": ["a"]}, "cache_salt must be a string, got ['a']"),
        ({"cache_salt": 0}, "cache_salt must be a string, got 0"),
        ({"priority": "x"}, "priority must be an integer, got 'x'"),
        ({"params": {}}, "sampling parameters must be a SamplingParams, got {}"),
        ({"params": {"n": 1}}, "must be a SamplingParams"),
    ],
)
def test_wrong_types_never_reach_the_engine(llm: LLM, options: dict[str, Any], message: str) -> None:
    llm.engine.add_request("good", "In the beginning", SamplingParams(max_tokens=3, temperature=0))
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        llm.engine.add_request("bad", "And", **options)
    assert message in str(error.value)
    assert list(finished(llm.engine)) == ["good"]


def test_wrong_sampling_params_are_named(llm: LLM) -> None:
    for wrong in ({"temperature": 0}, 5):
        with pytest.raises(ValueError, match="must be a SamplingParams or a list of them"):
            llm.generate("a", wrong, use_tqdm=False)  # type: ignore[arg-type]


def test_numbers_and_ids_of_numpy_and_pytorch(llm: LLM) -> None:
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("In the beginning")
    plain = SamplingParams(max_tokens=3, temperature=0, seed=5, stop_token_ids=[7])
    params = SamplingParams(
        max_tokens=np.int64(3),  # type: ignore[arg-type]
        temperature=np.float32(0),  # type: ignore[arg-type]
        seed=np.uint64(5),  # type: ignore[arg-type]
        stop_token_ids=np.array([7]),  # type: ignore[arg-type]
    )
    assert params == plain
    assert type(params.max_tokens) is type(params.seed) is int
    wanted = llm.generate([ids, ids], plain, use_tqdm=False)
    for prompts in (np.array([ids, ids]), torch.tensor([ids, ids]), [np.array(ids), torch.tensor(ids)]):
        outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        assert [o.prompt_token_ids for o in outputs] == [ids, ids]
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in wanted]
    assert llm.generate(np.array(ids), params, use_tqdm=False)[0].prompt_token_ids == ids  # type: ignore[arg-type]
    for prompt in (torch.tensor([True, False]), np.array([True]), np.array(5), torch.tensor(5)):
        with pytest.raises(ValueError, match="^[^\n]*$"):
            llm.generate(prompt, plain, use_tqdm=False)  # type: ignore[arg-type]
    for wrong in (np.bool_(True), np.float64(3)):
        with pytest.raises(ValueError, match="max_tokens must be an integer"):
            SamplingParams(max_tokens=wrong)  # type: ignore[arg-type]


def test_a_tokenizer_larger_than_the_model_harms_nobody_else(tmp_path: Path) -> None:
    folder = echo_folder(tmp_path / "small", vocab_size=300)
    with LLM(device="cpu") as builtin:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((builtin.engine.folder / name).read_bytes())
    engine = LLMEngine(EngineConfig(str(folder), load_format="dummy", device="cpu"))
    engine.add_request("good", [5, 6, 7], SamplingParams(max_tokens=4))
    with pytest.raises(ValueError, match="no id of the vocabulary of 300"):
        engine.add_request("bad", "In the beginning God created the heaven")
    with pytest.raises(ValueError, match="bad_words holds"):
        engine.add_request("bad", [5], SamplingParams(bad_words=["heaven"]))
    assert finished(engine)["good"].outputs[0].finish_reason == "length"
    engine.shutdown()


def test_prompt_logprobs_are_complete_after_preemptions(llm: LLM) -> None:
    """Every prompt token is scored once and at its own place, however often its prefill is interrupted."""
    preemptions = 0
    for seed in (3, 5, 8, 13, 21, 34):
        rng = random.Random(seed)
        settings = {"block_size": 4, "max_model_len": 100, "enable_prefix_caching": False, "max_num_seqs": 12}
        engine = LLMEngine(
            EngineConfig(num_kv_blocks=rng.randrange(26, 34), max_num_batched_tokens=6, device="cpu", **settings)
        )
        prompts, done = {}, {}
        for i in range(12):
            scored = rng.random() < 0.4
            prompt = [rng.randrange(5, 2500) for _ in range(rng.randrange(40, 80) if scored else rng.randrange(8, 24))]
            prompts[str(i)] = prompt if scored else None
            params = SamplingParams(max_tokens=rng.randrange(2, 20), prompt_logprobs=1 if scored else None)
            engine.add_request(str(i), prompt, params)
            done |= {output.request_id: output for output in engine.step() if output.finished}
        done |= finished(engine)
        engine.shutdown()
        for name, prompt in prompts.items():
            preemptions += done[name].metrics.num_preemptions
            if prompt is not None:
                scores = done[name].prompt_logprobs
                assert len(scores) == len(prompt)
                assert scores[0] is None
                assert all(token in scores[at] for at, token in enumerate(prompt) if at)
    assert preemptions > 0


def test_scores_of_a_chunk_from_before_a_preemption_are_dropped() -> None:
    """The chunk in flight comes late, for a request that computes its prompt anew; then the same places come again."""
    request = Request("r", list(range(10, 20)), RowSampling(seed=0), 1, prompt_logprobs=0)
    request.status = RequestStatus.RUNNING

    def chunk(start: int, count: int) -> None:
        ids = request.token_ids[start + 1 : start + 1 + count]
        none = np.zeros((count, 0))
        scores = Scores(np.arange(start, start + count, dtype=np.float32), np.ones(count, int), none.astype(int), none)
        plan = BatchPlan(0, 1, b"", scored=[(0, start, 0, ids)])
        step = Step(plan, [request], [], [], np.zeros((1, 0), int), [], [], StepStats(0, 0.0))
        take_in(step, StepResult(np.zeros(0, int), np.zeros(0, bool), prompt_scores=(scores,)), False)

    for start, count in ((4, 3), (0, 2), (0, 4), (4, 5), (2, 3)):  # late; early, twice; on; late again
        chunk(start, count)
    chunk(5, 4)
    scored = request.prompt_logprob_list
    assert scored is not None
    assert [entry and entry[10 + at].logprob for at, entry in enumerate(scored)] == [None, *range(9)]


@pytest.mark.parametrize("content", [b"my precious notes", b'{"prompt": "a"}', b'{"index": 0, "id": "other"}\n'])
def test_output_never_destroys_a_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a"}))
    target = tmp_path / "notes.txt"
    target.write_bytes(content)
    assert main(["generate", "--input", str(tmp_path / "in.jsonl"), "--output", str(target)]) == 2
    assert target.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"architectures": 5}, "architecture"),
        ({"quantization_config": True}, "quantization_config"),
        ({"eos_token_id": 2.5}, "eos_token_id"),
        ({"rms_norm_eps": None}, "config.json"),
        ({"rope_parameters": True}, "config.json"),
        ({"num_hidden_layers": 10**12}, "weights"),
    ],
)
def test_config_values_of_a_wrong_type(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match="^[^\n]*$") as error:
        LLM(str(tmp_path), load_format="dummy", device="cpu")
    assert word in str(error.value)


def test_a_gpu_too_old_for_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from flover.engine import engine

    monkeypatch.setattr(engine, "detect_hardware", lambda _: Hardware("cuda", 8 << 30))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"too old for bfloat16 .* dtype='float16' works"):
        LLM("kjv-llama", dtype="bfloat16")
