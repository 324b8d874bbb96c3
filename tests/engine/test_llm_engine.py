"""`LLMEngine` and `LLM` over the built-in model: text, stop strings, choices, bad input, interruptions."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flover
from flover.config import EngineConfig
from flover.engine.llm_engine import LLMEngine
from flover.llm import LLM
from flover.request import RequestOutput
from flover.sampling_params import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))
from harness import echo_folder

BUILTIN = Path(flover.__file__).parent / "builtin" / "kjv-llama"
PROMPT = "And it came to pass"
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "max_model_len": 128, "device": "cpu"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _idle_afterwards(llm: LLM) -> Iterator[None]:
    yield
    assert llm.engine.num_requests == 0
    assert not llm.engine.has_unfinished_requests()
    assert not llm.engine._choices


@pytest.fixture(scope="module")
def greedy(llm: LLM) -> RequestOutput:
    return llm.generate(PROMPT, GREEDY)[0]


def drive(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Step to the end, checking that text only ever grows."""
    last: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            before = last.get(output.request_id)
            assert before is None or not before.finished, "nothing comes after the end"
            for i, choice in enumerate(output.outputs):
                if before is not None:
                    assert choice.text.startswith(before.outputs[i].text)
                    assert choice.token_ids[: len(before.outputs[i].token_ids)] == before.outputs[i].token_ids
            last[output.request_id] = output
    return last


# ---- outputs -----------------------------------------------------------------------------------------------


def test_output_fields(llm: LLM, greedy: RequestOutput) -> None:
    choice = greedy.outputs[0]
    assert greedy.finished
    assert greedy.prompt == PROMPT
    assert greedy.prompt_token_ids == llm.engine.tokenizer.encode(PROMPT)
    assert choice.text == llm.engine.tokenizer.decode(choice.token_ids)
    assert (len(choice.token_ids), choice.finish_reason, choice.stop_reason) == (24, "length", None)
    assert choice.logprobs is None
    assert choice.cumulative_logprob is None
    m = greedy.metrics
    assert m is not None
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time < m.last_token_time <= m.finished_time
    assert (m.num_output_tokens, m.num_preemptions) == (24, 0)
    assert m.ttft + m.tpot * 23 == pytest.approx(m.e2e)


@pytest.mark.parametrize("form", ["text", "ids", "numpy", "dict text", "dict ids", "both"])
def test_prompt_forms(llm: LLM, greedy: RequestOutput, form: str) -> None:
    ids = greedy.prompt_token_ids
    prompts: dict[str, Any] = {
        "text": PROMPT,
        "ids": ids,
        "numpy": list(np.array(ids)),
        "dict text": {"prompt": PROMPT},
        "dict ids": {"prompt_token_ids": ids},
        "both": {"prompt": PROMPT, "prompt_token_ids": ids},
    }
    for prompt in (prompts[form], [prompts[form]]):
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == greedy.outputs[0].token_ids


def test_streamed_pieces_join(llm: LLM, greedy: RequestOutput) -> None:
    texts = [output.outputs[0].text for output in llm.stream(PROMPT, GREEDY)]
    assert len(texts) == 24
    assert all(b.startswith(a) for a, b in pairwise(texts))
    assert texts[-1] == greedy.outputs[0].text


def test_results_come_in_the_order_of_the_prompts(llm: LLM, greedy: RequestOutput) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (24, 1, 12, 5)]
    outputs = llm.generate([PROMPT] * 4, params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [24, 1, 12, 5]
    for output in outputs:
        n = len(output.outputs[0].token_ids)
        assert output.outputs[0].token_ids == greedy.outputs[0].token_ids[:n]
    assert llm.generate([], GREEDY) == []


def test_max_tokens_none_is_the_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    output = llm.generate([[5] * 100, [5] * 128], params)
    assert [len(o.outputs[0].token_ids) for o in output] == [28, 1]
    assert {o.outputs[0].finish_reason for o in output} == {"length"}


def test_logprobs(llm: LLM, greedy: RequestOutput) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=0)
    output = llm.generate(PROMPT, params)[0]
    choice, tokenizer = output.outputs[0], llm.engine.tokenizer
    assert choice.token_ids == greedy.outputs[0].token_ids[:6]
    assert choice.logprobs is not None
    for token, entry in zip(choice.token_ids, choice.logprobs, strict=True):
        assert len(entry) == 3
        assert entry[token].rank == 1
        assert {t: p.decoded_token for t, p in entry.items()} == {t: tokenizer.decode([t]) for t in entry}
    total = sum(entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs))
    assert choice.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert entry is not None
        assert list(entry) == [token]
        assert entry[token].decoded_token == tokenizer.decode([token])


# ---- how requests end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
def test_stop_string_over_tokens(greedy: RequestOutput, include: bool, depth: int) -> None:
    text, ids = greedy.outputs[0].text, greedy.outputs[0].token_ids
    stop = text[11:17]
    end = text.index(stop)
    engine = LLMEngine(EngineConfig(overlap_depth=depth, **SETTINGS))
    params = SamplingParams(temperature=0, max_tokens=24, stop=[stop, "@@"], include_stop_str_in_output=include)
    engine.add_request("a", PROMPT, params)
    engine.add_request("b", PROMPT, GREEDY)
    outputs = drive(engine)
    choice = outputs["a"].outputs[0]
    assert choice.text == text[: end + len(stop) if include else end]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    whole = [engine.tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
    assert len(choice.token_ids) == next(n for n, prefix in enumerate(whole) if stop in prefix)
    assert choice.token_ids == ids[: len(choice.token_ids)]
    assert outputs["b"].outputs[0].token_ids == ids, "the neighbour is unharmed"
    engine.shutdown()


def test_stop_string_in_the_last_token(llm: LLM, greedy: RequestOutput) -> None:
    """It outranks the length that ends the request in the same step."""
    last = llm.engine.tokenizer.decode(greedy.outputs[0].token_ids)[-2:]
    first = greedy.outputs[0].text.index(last) + 2 == len(greedy.outputs[0].text)
    choice = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, stop=last))[0].outputs[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", last)
    assert not first or len(choice.token_ids) == 24


def test_stop_string_waits_for_min_tokens(llm: LLM, greedy: RequestOutput) -> None:
    """Most words begin with a space; the first of the min_tokens-th token or later counts."""
    texts = ["", *(output.outputs[0].text for output in llm.stream(PROMPT, GREEDY))]
    spaced = [n for n in range(1, 25) if " " in texts[n][len(texts[n - 1]) :]]
    assert len(spaced) > 5
    for least in (0, 1, spaced[2], spaced[2] + 1, spaced[4]):
        params = SamplingParams(temperature=0, max_tokens=24, min_tokens=least, stop=" ")
        choice = llm.generate(PROMPT, params)[0].outputs[0]
        n = next(n for n in spaced if n >= least)
        assert choice.token_ids == greedy.outputs[0].token_ids[:n]
        assert choice.text == texts[n][: texts[n].index(" ", len(texts[n - 1]))]
        assert choice.stop_reason == " "


@pytest.mark.parametrize("include", [False, True])
def test_stop_token_id(llm: LLM, greedy: RequestOutput, include: bool) -> None:
    """It stays in token_ids; its text goes unless asked for."""
    ids = greedy.outputs[0].token_ids
    stop = ids[9]
    n = ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[stop], include_stop_str_in_output=include)
    choice = llm.generate(PROMPT, params)[0].outputs[0]
    assert choice.token_ids == ids[: n + 1]
    assert choice.text == llm.engine.tokenizer.decode(ids[: n + include])
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_eos(llm: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 4, "logit_bias": {0: 100}}
    choice = llm.generate(PROMPT, SamplingParams(**params))[0].outputs[0]
    assert (choice.token_ids, choice.text, choice.finish_reason, choice.stop_reason) == ([0], "", "stop", None)
    choice = llm.generate(PROMPT, SamplingParams(ignore_eos=True, skip_special_tokens=False, **params))[0].outputs[0]
    assert (choice.token_ids, choice.text) == ([0] * 4, "<|endoftext|>" * 4)
    choice = llm.generate(PROMPT, SamplingParams(min_tokens=3, **params))[0].outputs[0]
    assert len(choice.token_ids) == 4
    assert 0 not in choice.token_ids[:3]
    assert choice.token_ids[3] == 0


def test_abort(llm: LLM) -> None:
    engine = llm.engine
    engine.add_request("a", PROMPT, SamplingParams(n=2, max_tokens=50, ignore_eos=True))
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))
    for _ in range(4):
        engine.step()
    engine.abort("a")
    engine.abort("nobody")
    outputs = drive(engine)
    assert [c.finish_reason for c in outputs["a"].outputs] == ["abort", "abort"]
    assert outputs["b"].outputs[0].finish_reason == "length"
    engine.add_request("a", PROMPT, GREEDY)
    engine.abort("a")
    assert drive(engine)["a"].outputs[0].token_ids == []


def test_a_row_without_a_token_left(llm: LLM, greedy: RequestOutput) -> None:
    """The only token allowed is masked: that request ends with an error, its neighbour goes on."""
    bad = SamplingParams(allowed_token_ids=[0], min_tokens=2, max_tokens=4)
    failed, well = llm.generate([PROMPT, PROMPT], [bad, GREEDY])
    assert failed.outputs[0].finish_reason == "error"
    assert "no token is left to choose" in str(failed.outputs[0].error)
    assert well.outputs[0].token_ids == greedy.outputs[0].token_ids


# ---- sampling ----------------------------------------------------------------------------------------------


def test_choices(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=12, temperature=1.0, stop=".", logprobs=1)
    output = llm.generate(PROMPT, params)[0]
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    assert len({choice.text for choice in output.outputs}) == 3
    again = llm.generate(
        [PROMPT, "In the", PROMPT], [SamplingParams(n=1, seed=5, max_tokens=12, stop="."), GREEDY, params]
    )
    assert again[0].outputs[0].token_ids == output.outputs[0].token_ids
    assert [c.token_ids for c in again[2].outputs] == [c.token_ids for c in output.outputs]
    assert output.metrics is not None
    assert output.metrics.num_output_tokens == max(len(c.token_ids) for c in output.outputs)


def test_seeds_come_from_the_engine_in_order() -> None:
    texts = []
    for seed, prompts in ((1, [PROMPT] * 3), (1, [PROMPT] * 2), (2, [PROMPT])):
        with LLM(seed=seed, **SETTINGS) as other:
            outputs = other.generate(prompts, SamplingParams(temperature=1.0, max_tokens=12))
            texts.append([output.outputs[0].text for output in outputs])
    assert texts[0][:2] == texts[1]
    assert len({texts[0][0], texts[0][1], texts[2][0]}) == 3


def test_bad_words(llm: LLM, greedy: RequestOutput) -> None:
    word = greedy.outputs[0].text.split()[2].strip(",.;")
    choice = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24, bad_words=[word]))[0].outputs[0]
    assert word not in choice.text.split()
    assert choice.token_ids != greedy.outputs[0].token_ids


# ---- bad input ---------------------------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "prompt is empty"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt_token_ids": []}, "prompt is empty"),
    ({"prompt_token_ids": [1, 2560]}, "prompt_token_ids holds 2560, .* vocabulary of 2560"),
    ([3, -1], "holds -1"),
    ([3, 1.5], "holds 1.5"),
    ([3, True], "holds True"),
    ([3, "a"], "holds 'a'"),
    ({"prompt_token_ids": "abc"}, "must be a list of token ids"),
    ({"prompt_token_ids": 7}, "must be a list of token ids"),
    ({"prompt": 7}, "prompt must be text, got 7"),
    ({"text": "x"}, r"'prompt' or 'prompt_token_ids', got \['text'\]"),
    ({}, "prompt"),
    ("a\ud800", "surrogate"),
    ([5] * 129, "a prompt of 129 tokens is longer than the context of 128"),
    (7, "got 7"),
    (None, "got None"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        llm.engine.add_request("x", prompt, GREEDY)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=rf"prompt 1: .*{message}"):
        llm.generate([PROMPT, prompt, PROMPT], GREEDY)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"stop_token_ids": [2560]}, "stop_token_ids holds 2560"),
        ({"allowed_token_ids": [1, 9999]}, "allowed_token_ids holds 9999"),
        ({"logit_bias": {9999: 1}}, "logit_bias holds 9999"),
        ({"bad_words": [" "]}, "bad_words holds ' '"),
    ],
)
def test_parameters_that_the_model_cannot_serve(llm: LLM, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPT, SamplingParams(**params))


def test_ids_in_use(llm: LLM) -> None:
    engine = llm.engine
    engine.add_request("a", PROMPT, SamplingParams(n=2, max_tokens=3))
    for request_id in ("a", "a#1"):
        with pytest.raises(ValueError, match=f"request_id '{request_id}' is already running"):
            engine.add_request(request_id, PROMPT, GREEDY)
    for request_id in ("", None, 3):
        with pytest.raises(ValueError, match="request_id must be a non-empty string"):
            engine.add_request(request_id, PROMPT, GREEDY)  # type: ignore[arg-type]
    drive(engine)
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=1))
    drive(engine)


def test_an_id_is_free_once_its_stop_string_came(llm: LLM) -> None:
    """The core may still be computing for the old one."""
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=24, stop=" ")
    engine.add_request("a", PROMPT, params)
    first = None
    while first is None:
        first = next((o for o in engine.step() if o.finished), None)
    engine.add_request("a", PROMPT, GREEDY)
    assert len(drive(engine)["a"].outputs[0].token_ids) == 24


def test_what_never_fits_the_cache() -> None:
    with LLM(num_kv_blocks=8, block_size=8, max_num_seqs=4, max_model_len=128, device="cpu") as small:
        with pytest.raises(ValueError, match="30 prompt tokens and up to 36 output .* 64 tokens; max_tokens=35 would"):
            small.generate([[5] * 30], SamplingParams(max_tokens=36))
        with pytest.raises(ValueError, match="the prompt alone cannot"):
            small.generate([[5] * 70], SamplingParams(max_tokens=1))
        assert len(small.generate([[5] * 30], SamplingParams(max_tokens=35))) == 1


def test_without_tokenizer(tmp_path: Path) -> None:
    with LLM(str(echo_folder(tmp_path / "echo")), load_format="dummy", max_num_seqs=2, device="cpu") as echo:
        output = echo.generate([[1, 2, 3]], SamplingParams(max_tokens=5, logprobs=1))[0].outputs[0]
        assert (len(output.token_ids), output.text) == (5, "")
        with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
            echo.generate("hi")
        with pytest.raises(ValueError, match="stop needs a tokenizer"):
            echo.generate([[1]], SamplingParams(stop="x"))
        with pytest.raises(ValueError, match="bad_words needs a tokenizer"):
            echo.generate([[1]], SamplingParams(bad_words=["x"]))
        with pytest.raises(ValueError, match="logprobs=98 is more than the vocabulary of 97"):
            echo.generate([[1]], SamplingParams(logprobs=98))
        with pytest.raises(ValueError, match="chat needs a tokenizer"):
            echo.chat([{"role": "user", "content": "hi"}])


def test_corrupt_tokenizer(tmp_path: Path) -> None:
    shutil.copytree(BUILTIN, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is corrupt"):
        LLM(str(tmp_path / "m"))


# ---- LLM ---------------------------------------------------------------------------------------------------


def test_options() -> None:
    with pytest.raises(ValueError, match="unknown option 'max_model_length'; did you mean 'max_model_len'"):
        LLM(max_model_length=3)
    with pytest.raises(ValueError, match="kv_layout must be one of"):
        LLM(kv_layout="heap")


def test_params_for_each(llm: LLM) -> None:
    with pytest.raises(ValueError, match="2 sampling_params were given for 1 prompts"):
        llm.generate([PROMPT], [GREEDY, GREEDY])


def test_explain(llm: LLM) -> None:
    settings = {setting.name: setting for setting in llm.explain()}
    assert settings["max_model_len"].value == 128
    assert settings["max_model_len"].origin == "given"
    assert settings["kv_layout"].origin == "default"


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": PROMPT}]
    one = llm.chat(conversation, GREEDY)[0]
    assert one.prompt == PROMPT + "\n"
    two = llm.chat([conversation, conversation], GREEDY)
    assert [o.outputs[0].token_ids for o in two] == [one.outputs[0].token_ids] * 2
    assert llm.get_default_chat_params().max_tokens is None
    with pytest.raises(ValueError, match="message"):
        llm.chat([])


def test_sampling_defaults(llm: LLM, tmp_path: Path) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.8, top_p=0.95)
    folder = tmp_path / "m"
    shutil.copytree(BUILTIN, folder)

    def defaults(text: str, **options: Any) -> SamplingParams:
        (folder / "generation_config.json").write_text(text)
        with LLM(str(folder), **SETTINGS, **options) as other:
            return other.get_default_sampling_params()

    assert defaults('{"top_k": 7, "max_new_tokens": 9}') == SamplingParams(top_k=7, max_tokens=9)
    assert defaults('{"do_sample": false, "temperature": 0.6}').temperature == 0
    assert defaults('{"temperature": 0.6}', generation_config="none") == SamplingParams()
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p must be"):
        defaults('{"top_p": 7}')


def test_threads_may_share_an_llm(llm: LLM) -> None:
    params, prompts = (
        SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
        [f"King {i} said" for i in range(4)],
    )
    alone = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            together = pool.map(lambda prompt: llm.generate(prompt, params)[0], prompts)
            assert [output.outputs[0].token_ids for output in together] == alone


def test_requests_of_the_engine_itself_are_not_lost(llm: LLM) -> None:
    llm.engine.add_request("mine", PROMPT, GREEDY)
    with pytest.raises(ValueError, match="1 requests of `engine.add_request` have not ended"):
        llm.generate(PROMPT, GREEDY)
    finished: list[str] = []
    while llm.engine.has_unfinished_requests():
        finished += [output.request_id for output in llm.engine.step() if output.finished]
    assert finished == ["mine"]


def test_an_engine_that_is_shut_down_says_so() -> None:
    engine = LLMEngine(EngineConfig(device="cpu"))
    engine.shutdown()
    for call in (lambda: engine.add_request("a", "hi"), engine.step):
        with pytest.raises(ValueError, match="this engine is shut down"):
            call()


def test_streams_may_be_interleaved(llm: LLM, greedy: RequestOutput) -> None:
    stream = llm.stream(PROMPT, GREEDY)
    texts = [next(stream).outputs[0].text for _ in range(3)]
    between = llm.generate([PROMPT] * 2, GREEDY)
    assert [o.outputs[0].text for o in between] == [greedy.outputs[0].text] * 2
    texts += [output.outputs[0].text for output in stream]
    assert texts[-1] == greedy.outputs[0].text


def test_an_abandoned_stream_is_aborted(llm: LLM) -> None:
    stream = llm.stream([PROMPT] * 3, SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert llm.engine.num_requests == 3
    before = llm.engine.num_steps
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.num_requests == 0
    assert llm.engine.num_steps < before + 4, "aborted, not run to the end"


def test_arrivals(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps, core_step = llm.engine, 0, llm.engine.core.step

    def step() -> Any:
        nonlocal steps
        steps += 1
        return core_step()

    monkeypatch.setattr(engine.core, "step", step)
    prepared = [engine.prepare(name, PROMPT, SamplingParams(max_tokens=4, ignore_eos=True)) for name in "abcd"]
    seen: list[str] = []
    for output in llm.run(prepared, [50, 0, 2, 50]):
        if output.request_id not in seen:
            seen.append(output.request_id)
    assert seen[:2] == ["b", "c"], "a and d came once the others were done, not after 50 idle steps"
    assert sorted(seen[2:]) == ["a", "d"]
    assert steps < 20


def test_interrupt_takes_effect_between_steps(llm: LLM, greedy: RequestOutput, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside a step: the step is finished, the call ends, the engine lives on."""
    core_step, begun, ended = llm.engine.core.step, 0, 0

    def step() -> Any:
        nonlocal begun, ended
        begun += 1
        if begun == 4:
            signal.raise_signal(signal.SIGINT)
        output = core_step()
        ended += 1
        return output

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.core, "step", step)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT] * 3, SamplingParams(max_tokens=100, ignore_eos=True))
    assert begun == ended < 10
    assert llm.engine.num_requests == 0
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].text == greedy.outputs[0].text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_closed() -> None:
    other = LLM(**SETTINGS)
    stream = other.stream(PROMPT, SamplingParams(max_tokens=50))
    next(stream)
    other.close()
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="closed"):
        other.generate(PROMPT)


def test_timeline(tmp_path: Path) -> None:
    with LLM(record_timeline=True, **SETTINGS) as other:
        other.generate([PROMPT] * 3, [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 6, 9)])
        other.timeline.save(tmp_path / "t.json")
        steps = json.loads((tmp_path / "t.json").read_text())["steps"]
        assert [len(step["rows"]) for step in steps[:9]] == [3, 3, 3, 2, 2, 2, 1, 1, 1]
        assert all(steps[0]["prefilling"])
        assert other.engine.num_steps == 9
        assert other.engine.num_row_steps == 18


def test_startup_times(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "flover"), LLM(device="cpu", max_model_len=64, max_num_seqs=2) as llm:
        times = llm.startup_times
        assert list(times.seconds) == ["imports", "config", "device", "weights", "packing", "KV cache", "tokenizer"]
        assert times.nbytes["weights"] > 1e6
        assert str(times) in caplog.messages
