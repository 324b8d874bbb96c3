"""Structured output: texts that always follow, rows beside them that do not change, limits that end one request."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flover import LLM, AsyncLLM, RequestOutput, SamplingParams
from flover.engine import grammar, grammar_check
from flover.engine.batch import BatchPlan, RowMasks, StepResult
from flover.engine.executor import InlineExecutor, PlanCancelledError, ThreadExecutor
from flover.layers.sampler import Sampler
from flover.request import Request, RowSampling
from flover.structured import StructuredOutputsParams

SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "integer", "minimum": -5, "maximum": 999},
    {"enum": ["red", "grün", {"a": [1, None]}]},
    {"type": "string", "maxLength": 6},
    {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,3}$"}, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "n": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    },
    {
        "$defs": {"leaf": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
]


OPTIONS = {"num_threads": 1, "max_num_seqs": 4, "num_kv_blocks": 40, "max_num_batched_tokens": 64}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_model_len=256, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module", params=[0, 1], ids=["depth0", "depth1"])
def invariant(request: Any) -> Iterator[LLM]:
    with LLM(overlap_depth=request.param, batch_invariant=True, max_model_len=256, **OPTIONS) as llm:
        yield llm


def params(kind: str, value: Any, **more: Any) -> SamplingParams:
    more.setdefault("max_tokens", 200)
    structured = StructuredOutputsParams(**{kind: value}, disable_any_whitespace=True)
    return SamplingParams(structured_outputs=structured, **more)


def one(llm: LLM, wanted: SamplingParams, prompt: str = "And") -> Any:
    return llm.generate(prompt, wanted)[0].outputs[0]


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, *range(len(SCHEMAS))]),
            st.integers(0, 2**32),
            st.sampled_from([0.0, 1.0, 3.0]),
            st.sampled_from(["In", "And it came to pass that", "x " * 60]),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_texts_follow_their_schemas_and_the_others_are_as_alone(
    invariant: LLM, jobs: list[tuple[int | None, int, float, str]]
) -> None:
    """More requests than rows, short of KV: rows leave, close up and are preempted, and masks stay with their rows."""
    wanted = [
        params("json", SCHEMAS[kind], seed=seed, temperature=heat)
        if kind is not None
        else SamplingParams(max_tokens=12, logprobs=1, ignore_eos=True, seed=seed, temperature=heat)
        for kind, seed, heat, _ in jobs
    ]
    prompts = [prompt for *_, prompt in jobs]
    fused = invariant.generate(prompts, wanted)
    for (kind, *_), output in zip(jobs, fused):
        text, reason = output.outputs[0].text, output.outputs[0].finish_reason
        assert output.outputs[0].error is None
        if kind is not None:
            assert reason == "stop"
            jsonschema.validate(json.loads(text), SCHEMAS[kind])
    for (kind, *_), prompt, alone, output in zip(jobs, prompts, wanted, fused):
        if kind is None:
            assert told(invariant.generate(prompt, alone)[0]) == told(output)


def told(output: RequestOutput) -> Any:
    choice = output.outputs[0]
    return choice.token_ids, [[(t, p.logprob) for t, p in entry.items()] for entry in choice.logprobs or ()]


@pytest.mark.parametrize("regex", [r"[0-9]{3}-[0-9]{4}", r"(yes|no)/\d+\.\d{2}", "a\nb", r"é{2}[^\W\d]{1,4}"])
def test_regex_choice_and_grammar(llm: LLM, regex: str) -> None:
    for seed in range(3):
        assert re.fullmatch(regex, one(llm, params("regex", regex, seed=seed, max_tokens=60)).text)
    assert one(llm, params("choice", ['a "b"', "ähm/\\", "c\nd"], seed=1)).text in ('a "b"', "ähm/\\", "c\nd")
    assert re.fullmatch("ab{1,3}c", one(llm, params("grammar", 'start: "a" "b"~1..3 "c"')).text)
    assert re.fullmatch("ab*c", one(llm, params("grammar", 'root ::= "a" "b"* "c"', max_tokens=200)).text)
    assert one(llm, params("json_object", True, seed=3, max_tokens=9)).text.startswith("{")


def test_whitespace_is_as_asked(llm: LLM) -> None:
    spaced = StructuredOutputsParams(json=SCHEMAS[5], whitespace_pattern=" ")
    text = one(llm, SamplingParams(structured_outputs=spaced, max_tokens=80, seed=2)).text
    assert re.fullmatch(r'\{ "name": ".*", "n": \d+ \}', text), text
    with pytest.raises(ValueError, match="cannot be compiled"):
        one(llm, SamplingParams(structured_outputs={"json": {}, "whitespace_pattern": "[a-"}))  # type: ignore[arg-type]


def test_choices_of_a_prompt_have_states_of_their_own(llm: LLM) -> None:
    outputs = llm.generate("And", params("json", SCHEMAS[5], n=6, temperature=2.0, seed=4))[0].outputs
    for output in outputs:
        jsonschema.validate(json.loads(output.text), SCHEMAS[5])
    assert len({output.text for output in outputs}) > 1


def test_the_limit_in_the_middle_leaves_a_valid_beginning(llm: LLM) -> None:
    whole = one(llm, params("json", SCHEMAS[5], seed=9))
    cut = one(llm, params("json", SCHEMAS[5], seed=9, max_tokens=5))
    assert cut.finish_reason == "length"
    assert whole.text.startswith(cut.text)
    assert len(cut.token_ids) == 5


def test_it_ends_in_spite_of_ignore_eos(llm: LLM) -> None:
    assert one(llm, params("choice", ["yes"], ignore_eos=True)).finish_reason == "stop"


@pytest.mark.parametrize("more", [{"min_tokens": 30}, {"logit_bias": {0: -100.0}, "allowed_token_ids": [5]}])
def test_a_dead_end_ends_that_request_alone(llm: LLM, more: dict[str, Any]) -> None:
    dead, alive = llm.generate(["And", "Or"], [params("choice", ["yes"], **more), params("choice", ["no"])])
    assert dead.outputs[0].finish_reason == "error"
    assert "no token is left" in (dead.outputs[0].error or "")
    assert alive.outputs[0].text == "no"


BAD: list[tuple[str, Any, str]] = [
    ("json", {"type": "banana"}, "banana"),
    ("json", {"$ref": "http://127.0.0.1:9/x.json"}, "does not fetch"),
    ("json", {"$ref": "file:///etc/passwd"}, "does not fetch"),
    ("json", {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text satisfies it"),
    ("json", {"enum": []}, "Unsatisfiable"),
    ("json", '{"a":' * 10_000 + "1" + "}" * 10_000, "too deeply"),
    ("json", "{'a'", "must be a JSON schema"),
    ("json", {"enum": ["x" * 300_000]}, "the limit is 262144"),
    ("json", {"type": "integer", "multipleOf": 1_999_993, "maximum": 10**15}, "more than 1 s"),
    ("json", [1], "must be a JSON schema"),
    ("regex", "(?<=a)b", "look-behind"),
    ("regex", "[a-", "unclosed"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", "[^\0-\U0010ffff]", "no text satisfies it"),
    ("grammar", "start: nothing", "nothing"),
    ("grammar", "root ::= (", "GBNF"),
    ("choice", [], "non-empty"),
    ("choice", [""], "non-empty"),
    ("choice", ["a"] * 5000, "the limit is 4096"),
]


@pytest.mark.parametrize(("kind", "value", "message"), BAD, ids=lambda value: str(value)[:24])
def test_what_cannot_be_compiled_is_refused_in_one_line(llm: LLM, kind: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        one(llm, params(kind, value))
    assert "\n" not in str(error.value)
    assert one(llm, params("choice", ["yes"])).text == "yes"


def test_the_compiler_has_one_second_of_cpu_time(llm: LLM) -> None:
    left = "lambda *_: str(signal.getitimer(signal.ITIMER_PROF)[0])"
    code = f"import signal; from flover.engine import grammar_check as g; g._verdict = {left}; g.main()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        for message in ([str(llm.engine.folder), 2560, [0]], "first", "second"):
            grammar_check._send(child.stdin, message)
        assert all(0.9 < float(grammar_check._receive(child.stdout)) < 1.1 for _ in range(2))
        assert child.stdin is not None
        child.stdin.close()


HOSTILE = ["foo**", "(a+)+$", "(a|a)*b", "a{1000000}", "(a{1000}){1000}", ".*a.{20}", "[ab]*a[ab]{30}"]


@pytest.mark.parametrize("regex", HOSTILE)
def test_hostile_expressions_are_cheap_or_end_alone(llm: LLM, regex: str) -> None:
    try:
        output = one(llm, params("regex", regex, max_tokens=8))
    except ValueError as error:
        assert "cannot be compiled" in str(error)  # noqa: PT017
    else:
        assert output.finish_reason in ("stop", "length") or "structured_outputs failed" in (output.error or "")


def test_two_kinds_none_and_unknown_ones() -> None:
    for wrong in ({}, {"json": {}, "regex": "a"}, {"jsn": {}}, 5, {"json_object": "yes"}, {"regex": ""}):
        with pytest.raises(ValueError, match="structured_outputs|regex|json_object"):
            SamplingParams(structured_outputs=wrong)  # type: ignore[arg-type]


def test_a_mask_that_takes_too_long_ends_its_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "MASK_SECONDS", 0.0)
    output = one(llm, params("choice", ["yes"]))
    assert output.finish_reason == "error"
    assert "a mask took" in (output.error or "")


def test_a_compiler_out_of_memory_is_replaced(llm: LLM) -> None:
    checker = grammar_check.GrammarChecker(grammar.Vocabulary(llm.engine.folder, 2560, [0]))
    checker.check(params("choice", ["yes"]).structured_outputs.grammar_text())  # type: ignore[union-attr]
    assert checker._child is not None
    checker._child.kill()
    checker._child.wait()
    with pytest.raises(ValueError, match="memory"):
        checker.check(params("choice", ["no"]).structured_outputs.grammar_text())  # type: ignore[union-attr]
    checker.check(params("choice", ["maybe"]).structured_outputs.grammar_text())  # type: ignore[union-attr]
    checker.close()


def test_a_masked_plan_goes_out_before_the_result_before_is_read(llm: LLM) -> None:
    core: Any = llm.engine.core
    inner, log = core._executor, []

    class Recorder:
        def submit(self, plan: BatchPlan) -> Future[StepResult]:
            log.append(("submit", plan.masked))
            return self.watched(inner.submit(plan), plan.masked)

        def sample(self, masks: RowMasks) -> Future[StepResult]:
            log.append(("sample", masks.rows))
            return self.watched(inner.sample(masks), False)

        def watched(self, future: Future[StepResult], masked: bool) -> Future[StepResult]:
            read = future.result
            future.result = lambda timeout=None: log.append(("read", masked)) or read(timeout)  # type: ignore
            return future

    core._executor = Recorder()
    try:
        one(llm, params("regex", "[a-z]{8}", max_tokens=8))
    finally:
        core._executor = inner
    names = [name for name, _ in log]
    assert names[:6] == ["submit", "sample", "submit", "read", "sample", "submit"]


def test_aborted_while_it_compiles_frees_everything(llm: LLM) -> None:
    engine = llm.engine
    for i in range(3):
        engine.add_request(f"g{i}", "And", params("regex", f"[a-z]{{{i + 3}}}x"))
        engine.abort(f"g{i}")
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.core.scheduler.drained  # type: ignore[attr-defined]
    assert engine.core.scheduler._num_grammars == 0  # type: ignore[attr-defined]


def test_a_grammar_that_was_compiled_meanwhile_counts_as_waited_for(llm: LLM) -> None:
    """Between the look at it and the wait for it: who waits looks again, and only once."""
    grammars = grammar.Grammars(grammar.Vocabulary(llm.engine.folder, 2560, [0]))
    request = Request("g", [1], RowSampling(seed=0), 1, grammar=StructuredOutputsParams(choice=["yes"]).grammar_text())
    grammars.add(request)
    request.matcher._compiled.result()
    assert [grammars.wait(), grammars.wait()] == [True, False]
    grammars.shutdown()


def test_in_a_process_of_its_own() -> None:
    async def main() -> None:
        llm = AsyncLLM(num_threads=1)
        try:
            outputs = [output async for output in llm.generate("And", params("json", SCHEMAS[5], seed=1))]
            jsonschema.validate(json.loads(outputs[-1].outputs[0].text), SCHEMAS[5])
            with pytest.raises(ValueError, match="banana"):
                await anext(llm.generate("And", params("json", {"type": "banana"})))
        finally:
            llm.shutdown()

    asyncio.run(main())


def test_rows_without_a_mask_keep_every_bit() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 70)
    rows = torch.arange(5)

    def draw(masked: bool) -> Any:
        sampler = Sampler(6, 70, torch.device("cpu"))
        sampling = [RowSampling(seed=i, temperature=0.7, logprobs=2, masked=masked and i % 2 == 1) for i in range(5)]
        sampler.join(list(range(5)), sampling, [0] * 5, [[]] * 5, [[]] * 5)
        if masked:
            bits = np.zeros((2, 3), dtype=np.int32)
            bits[0, 2], bits[1, 0] = 1 << 5, -(2**31)  # only token 69; only token 31
            sampler.set_masks([3, 1], bits)
        return sampler.sample(logits, rows)

    with_masks, without = draw(True), draw(False)
    assert with_masks.token_ids[[3, 1]].tolist() == [69, 31]
    for mine, theirs in zip((with_masks.token_ids, *with_masks.logprobs), (without.token_ids, *without.logprobs)):
        assert torch.equal(mine[::2], theirs[::2])


def test_masks_move_with_their_rows() -> None:
    sampler = Sampler(4, 40, torch.device("cpu"))
    sampler.join([0, 2], [RowSampling(seed=1), RowSampling(seed=2, masked=True)], [0, 0], [[], []], [[], []])
    sampler.set_masks([2], np.array([[1 << 7, 0]], dtype=np.int32))
    sampler.leave([0])
    sampler.relocate([(2, 0)])
    assert sampler.sample(torch.zeros(1, 40), torch.tensor([0])).token_ids.tolist() == [7]
    sampler.leave([0])
    sampler.join([0], [RowSampling(seed=3, temperature=0.0)], [0], [[]], [[]])  # what the row held is gone
    logits = torch.zeros(1, 40)
    logits[0, 11] = 1
    assert sampler.sample(logits, torch.tensor([0])).token_ids.tolist() == [11]


class Halves:
    """A runner of two phases that fails where it is told to."""

    def __init__(self, fails: str) -> None:
        self.fails = fails

    def execute(self, plan: BatchPlan) -> StepResult:
        return StepResult(np.array([1]), np.array([True]))

    def launch(self, plan: BatchPlan) -> None:
        if self.fails == "launch":
            raise RuntimeError("no launch")

    def sample(self, masks: RowMasks | None) -> StepResult:
        if self.fails == "sample":
            raise RuntimeError("no sample")
        return StepResult(np.array([2]), np.array([True]))

    def warm_up(self, seconds: float) -> None:
        pass

    def reset(self) -> None:
        self.fails = ""

    def close(self) -> None:
        pass


@pytest.mark.parametrize("make", [lambda runner: InlineExecutor(runner), lambda runner: ThreadExecutor(lambda: runner)])
@pytest.mark.parametrize("fails", ["", "launch", "sample"])
def test_a_masked_plan_fails_where_it_is_sampled(make: Any, fails: str) -> None:
    executor = make(Halves(fails))
    masked, plain = BatchPlan(0, 0, b"", masked=True), BatchPlan(1, 0, b"")
    assert executor.submit(masked).exception(timeout=5) is None
    sampled, later = executor.sample(RowMasks([], b"")), executor.submit(plain)
    if fails:
        assert str(sampled.exception(timeout=5)) == f"no {fails}"
        assert isinstance(later.exception(timeout=5), PlanCancelledError)
        executor.reset()
        assert executor.submit(masked).exception(timeout=5) is None
        sampled, later = executor.sample(RowMasks([], b"")), executor.submit(plain)
    assert (sampled.result().token_ids.tolist(), later.result().token_ids.tolist()) == ([2], [1])
    executor.shutdown()


def test_a_failed_half_leaves_the_others_running(llm: LLM) -> None:
    """What the device fails at ends the rows of that step; the next ones, masked or not, are served."""
    runner: Any = llm.engine.core._executor._runner  # type: ignore[attr-defined]
    launch, count = runner.launch, iter(range(100))

    def failing(plan: BatchPlan) -> None:
        if next(count) == 3:
            raise RuntimeError("cosmic ray")
        launch(plan)

    runner.launch = failing
    try:
        output = one(llm, params("regex", "[a-z]{8}", max_tokens=8))
    finally:
        runner.launch = launch
    assert "cosmic ray" in (output.error or "")
    assert one(llm, params("choice", ["yes"])).text == "yes"
