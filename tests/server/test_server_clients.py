"""Clients as people use them: curl, the openai client's retries, litellm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator

import openai
import pytest
from serving import Server, serve


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-num-seqs", "1", "--max-queued-requests", "1") as server:
        yield server


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl(server: Server) -> None:
    command = ["curl", "-sSN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
    body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 5, "seed": 1}
    whole = json.loads(subprocess.check_output([*command, json.dumps(body)]))
    out = subprocess.check_output([*command, json.dumps({**body, "stream": True})]).decode()
    events = [line.removeprefix("data: ") for line in out.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(one)["choices"][0]["delta"].get("content") or "" for one in events[:-1]]
    assert "".join(deltas) == whole["choices"][0]["message"]["content"]


def test_retries_go_through_once_there_is_room(server: Server) -> None:
    impatient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    patient = impatient.with_options(max_retries=10)
    long = {"model": "kjv-llama", "prompt": "And", "max_tokens": 900, "stream": True}
    streams = [impatient.completions.create(**long, extra_body={"ignore_eos": True}) for _ in range(2)]  # type: ignore
    with pytest.raises(openai.RateLimitError) as error:
        impatient.completions.create(model="kjv-llama", prompt="And", max_tokens=2)
    assert error.value.code == "queue_full"
    assert int(error.value.response.headers["retry-after"]) >= 1
    timer = threading.Timer(0.5, lambda: [stream.close() for stream in streams])
    timer.start()
    answer = patient.completions.create(model="kjv-llama", prompt="And", max_tokens=2)
    assert answer.choices[0].text
    timer.join()


LITELLM = """
import litellm, sys
here = dict(model="openai/kjv-llama", api_base=sys.argv[1], api_key="none")
more = dict(messages=[{"role": "user", "content": "Who?"}], **here)
whole = litellm.completion(max_tokens=8, seed=1, **more).choices[0].message.content
pieces = [c.choices[0].delta.content or "" for c in litellm.completion(max_tokens=8, seed=1, stream=True, **more)]
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
named = {"type": "function", "function": {"name": "f"}}
call = litellm.completion(max_tokens=50, tools=[tool], tool_choice=named, **more).choices[0].message.tool_calls[0]
vector = litellm.embedding(input=["x"], **here).data[0]
assert whole and "".join(pieces) == whole and call.function.name == "f" and len(vector["embedding"]) == 256
"""


@pytest.mark.slow
def test_litellm(server: Server) -> None:
    pytest.importorskip("litellm")
    env = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [sys.executable, "-c", LITELLM, f"{server.url}/v1"], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
