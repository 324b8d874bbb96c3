"""AsyncLLM: the outputs of LLM from an engine in another process, cancels that leave nothing, deaths that are told."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from itertools import pairwise
from typing import Any

import psutil
import pytest

from flover import LLM, AsyncLLM, RequestOutput, SamplingParams
from flover.engine.remote import EngineDeadError

SETTINGS: dict[str, Any] = {"device": "cpu", "num_threads": 1}
CASES: list[tuple[Any, SamplingParams]] = [
    ("In the beginning", SamplingParams(temperature=0, max_tokens=12)),
    ("And Moses said", SamplingParams(seed=3, max_tokens=20, logprobs=2)),
    ([5, 6, 7], SamplingParams(seed=4, n=3, max_tokens=9, top_k=5)),
    ({"prompt": "The LORD is my"}, SamplingParams(temperature=0, max_tokens=40, stop=" the", prompt_logprobs=1)),
    ("Blessed", SamplingParams(temperature=0.7, seed=9, max_tokens=1, repetition_penalty=1.2)),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = AsyncLLM(dtype="float64", num_kv_blocks=24, max_model_len=256, enable_prefix_caching=False, **SETTINGS)
    yield llm
    llm.shutdown()


async def last(llm: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> RequestOutput:
    outputs = [output async for output in llm.generate(prompt, params, **options)]
    return outputs[-1]


def comparable(output: RequestOutput) -> Any:
    choices = [(c.text, c.token_ids, c.finish_reason, c.stop_reason, c.cumulative_logprob) for c in output.outputs]
    logprobs = [[sorted(entry) for entry in c.logprobs or ()] for c in output.outputs]
    scored = [None if entry is None else sorted(entry) for entry in output.prompt_logprobs or ()]
    return output.prompt, output.prompt_token_ids, choices, logprobs, scored


def test_the_same_outputs_as_llm(llm: AsyncLLM) -> None:
    async def together() -> list[RequestOutput]:
        return await asyncio.gather(*(last(llm, *case) for case in CASES))

    with LLM(dtype="float64", **SETTINGS) as offline:
        for want_case, got in zip(CASES, asyncio.run(together())):
            (want,) = offline.generate([want_case[0]], want_case[1])
            a, b = comparable(got), comparable(want)
            assert a[:2] + a[3:] == b[:2] + b[3:]
            for x, y in zip(a[2], b[2]):
                assert x[:4] == y[:4]
                assert x[4] == pytest.approx(y[4])
            assert got.finished
            assert got.metrics is not None
            assert 0 <= got.metrics.ttft <= got.metrics.e2e


def test_outputs_grow_and_a_slow_reader_sees_them_merged(llm: AsyncLLM) -> None:
    async def read(pause: float) -> list[list[int]]:
        seen = []
        async for output in llm.generate("And it came", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)):
            seen.append(output.outputs[0].token_ids)
            await asyncio.sleep(pause)
        return seen

    async def both() -> list[list[list[int]]]:
        return await asyncio.gather(read(0.0), read(0.5))

    quick, slow = asyncio.run(both())
    for seen in (quick, slow):
        assert all(a == b[: len(a)] and len(a) < len(b) for a, b in pairwise(seen))
    assert quick[-1] == slow[-1]
    assert len(quick[-1]) == 60
    assert len(slow) <= len(quick)
    assert len(slow) < 30


def test_abandoned_requests_leave_nothing(llm: AsyncLLM) -> None:
    """Left in the queue, in prefill, in decode, with n > 1; then one that needs nearly the whole cache runs."""

    async def leave(i: int, rng: random.Random) -> None:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, n=1 + i % 3)
        stream = llm.generate([7] * rng.randint(1, 50), params)
        wanted = rng.randint(0, 6)
        if wanted:
            async for _ in stream:
                wanted -= 1
                if not wanted:
                    break
            await stream.aclose()
        else:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext_of(stream), 0.001 * rng.random())

    async def anext_of(stream: Any) -> Any:
        async for output in stream:
            await asyncio.sleep(10)
            return output

    async def all_of_them() -> None:
        rng = random.Random(1)
        for _ in range(4):
            await asyncio.gather(*(leave(i, rng) for i in range(15)))
        whole = await last(llm, [3] * 200, SamplingParams(temperature=0, max_tokens=56, ignore_eos=True))
        assert len(whole.outputs[0].token_ids) == 56
        assert whole.metrics is not None
        assert whole.metrics.num_preemptions == 0

    asyncio.run(all_of_them())
    assert not llm.engine.core.has_unfinished()
    assert llm.engine.num_requests == 0


def test_abort_by_id(llm: AsyncLLM) -> None:
    async def aborted() -> RequestOutput:
        outputs = []
        async for output in llm.generate("And it came", SamplingParams(max_tokens=150, ignore_eos=True), "mine"):
            outputs.append(output)
            await llm.abort("mine")
            await llm.abort("nobody's")
        return outputs[-1]

    output = asyncio.run(aborted())
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"


def test_errors_are_those_of_llm(llm: AsyncLLM) -> None:
    with pytest.raises(ValueError, match="temperature|prompt is empty"):
        asyncio.run(last(llm, "", SamplingParams()))
    with pytest.raises(ValueError, match="longer than the context of 256"):
        asyncio.run(last(llm, [1] * 300, SamplingParams()))
    with pytest.raises(ValueError, match=r"unknown option 'max_len'.*"):
        AsyncLLM(max_len=3)
    with pytest.raises(ValueError, match="max_model_len=5000 is longer than the model's"):
        AsyncLLM(max_model_len=5000, **SETTINGS)

    async def twice() -> None:
        first = llm.generate("And", SamplingParams(max_tokens=100, ignore_eos=True), "same")
        async for _ in first:
            with pytest.raises(ValueError, match="'same' is already running"):
                await last(llm, "And", SamplingParams(), request_id="same")
            break
        await first.aclose()

    asyncio.run(twice())


def in_time(seconds: float, done: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.02)
    return done()


@pytest.mark.parametrize("stop", [None, "zzz"])
def test_a_text_that_cannot_be_made_ends_its_request_alone(llm: AsyncLLM, stop: str | None) -> None:
    class Broken:
        def push(self, tokens: Any) -> str:
            raise RuntimeError("no text")

    async def both() -> list[RequestOutput]:
        params = SamplingParams(max_tokens=20, ignore_eos=True, stop=stop)
        bad = await llm.prepare("And", params)
        bad.choices[0]._detokenizer = Broken()  # type: ignore[assignment]
        stream = llm.open([bad])
        good = asyncio.create_task(last(llm, "And", params))
        outputs = [output async for output in stream]
        stream.close()
        return [outputs[-1], await good]

    bad, good = asyncio.run(both())
    assert bad.outputs[0].finish_reason == "error"
    assert bad.outputs[0].error == "the text could not be made: RuntimeError"
    assert len(bad.outputs[0].token_ids) < 20
    assert good.outputs[0].finish_reason == "length"
    assert llm.is_running


def test_a_dead_engine_ends_every_stream() -> None:
    llm = AsyncLLM(**SETTINGS)

    async def killed() -> list[BaseException]:
        streams: list[Coroutine[Any, Any, Any]] = [
            last(llm, "And", SamplingParams(max_tokens=900, ignore_eos=True)) for _ in range(3)
        ]
        tasks = [asyncio.create_task(stream) for stream in streams]
        while not llm.engine.core.has_unfinished():
            await asyncio.sleep(0.01)
        llm._core._process.kill()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 2)

    assert [type(error) for error in asyncio.run(killed())] == [EngineDeadError] * 3
    assert not llm.is_running
    with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
        asyncio.run(last(llm, "And", SamplingParams()))
    llm.shutdown()


def test_the_engine_does_not_outlive_its_parent() -> None:
    code = (
        "import sys, time; from flover import AsyncLLM; llm = AsyncLLM(device='cpu', num_threads=1); "
        "assert 'torch' not in sys.modules; print(llm._core._process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    engine = int(parent.stdout.readline())
    assert psutil.pid_exists(engine)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert in_time(5, lambda: not psutil.pid_exists(engine) or psutil.Process(engine).status() == "zombie")


def test_shutdown_ends_the_engine_and_open_streams() -> None:
    llm = AsyncLLM(**SETTINGS)

    async def shut() -> None:
        async for _ in llm.generate("And", SamplingParams(max_tokens=900, ignore_eos=True)):
            if llm.is_running:
                llm.shutdown()

    with pytest.raises(EngineDeadError, match="was shut down"):
        asyncio.run(shut())
    assert llm._core._process.poll() == 0
