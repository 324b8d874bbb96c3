"""/v1/responses and /v1/embeddings through the openai client, and `flover run-batch`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from serving import Server, serve

from flover import SamplingParams
from flover.cli import main
from flover.cluster.offline import Engine
from flover.server.bodies import decode
from flover.server.responses import ResponseAnswer, ResponsesRequest


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def respond(client: openai.OpenAI, **more: Any) -> Any:
    return client.responses.create(model="kjv-llama", **{"input": "Who?", "max_output_tokens": 12, **more})


def test_a_response_is_the_chat(client: openai.OpenAI) -> None:
    more: Any = {"extra_body": {"seed": 1}}
    whole = client.responses.create(
        model="kjv-llama", input="Who?", instructions="Answer.", max_output_tokens=12, **more
    )
    messages: Any = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Who?"}]
    chat = client.chat.completions.create(model="kjv-llama", messages=messages, max_tokens=12, seed=1)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage is not None
    assert chat.usage is not None
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    items: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}]
    listed = client.responses.create(
        model="kjv-llama", input=items, instructions="Answer.", max_output_tokens=12, **more
    )
    assert listed.output_text == whole.output_text


def test_what_is_told_of_sampling_is_what_was_used() -> None:
    """Also where the defaults are those of generation_config.json."""
    request = decode(b'{"input": "Who?", "top_p": 0.8}', ResponsesRequest)
    params = request.sampling_params(SamplingParams(temperature=0.25, top_p=0.5))
    told = ResponseAnswer(request, params, "kjv-llama", 1)._response(None)
    assert (told["temperature"], told["top_p"], told["metadata"]) == (0.25, 0.8, {})


def test_stream_events(client: openai.OpenAI, server: Server) -> None:
    more: Any = {"extra_body": {"seed": 1}, "max_output_tokens": 12}
    whole = client.responses.create(model="kjv-llama", input="Who?", **more)
    with client.responses.stream(model="kjv-llama", input="Who?", **more) as stream:
        events: Any = list(stream)
    final = events[-1].response
    assert final.output_text == whole.output_text
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    body = {"input": "Who?", "stream": True, "max_output_tokens": 3}
    lines = server.http.post("/v1/responses", json=body).text.split("\n\n")
    assert all(line.startswith("event: response.") for line in lines if line)
    assert not any("[DONE]" in line for line in lines)


def test_what_a_deadline_leaves_is_incomplete(server: Server) -> None:
    body = {"input": "Who?", "max_output_tokens": 900, "ignore_eos": True, "timeout": 0.3}
    answer = server.http.post("/v1/responses", json=body)
    assert answer.status_code == 504
    partial = answer.json()["partial"]
    assert not partial or (partial["status"], partial["incomplete_details"]) == ("incomplete", None)


def test_logprobs_are_included(client: openai.OpenAI) -> None:
    def scored(**more: Any) -> list[Any]:
        part: Any = respond(client, max_output_tokens=3, extra_body={"seed": 1}, **more).output[0].content[0]
        return [(one.token, one.logprob < 0, len(one.top_logprobs)) for one in part.logprobs]

    assert scored() == []
    included: Any = {"include": ["message.output_text.logprobs"]}
    assert [rest for _, *rest in scored(**included)] == [[True, 0]] * 3
    assert [rest for _, *rest in scored(top_logprobs=2, **included)] == [[True, 2]] * 3


def test_a_schema_for_a_response(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}, "strict": True}}
    answer = client.responses.create(model="kjv-llama", input="Who?", text=form)
    assert json.loads(answer.output_text) in ("yes", "no")
    assert answer.status == "completed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "emperor", "content": "x"}]}, "input"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "max_output_tokens": 5000}, "max_output_tokens"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "n": 2}, "n"),
        ({"input": "x", "top_logprobs": 21}, "top_logprobs"),
        ({"input": "x", "text": {"format": {"type": "banana"}}}, "text"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "schema": {"type": "banana"}}}}, "text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_responses(server: Server, body: Any, param: str) -> None:
    answer = server.http.post("/v1/responses", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_embeddings(client: openai.OpenAI, server: Server) -> None:
    texts = ["In the beginning", "Moses", "In the beginning"]
    encoded = client.embeddings.create(model="kjv-llama", input=texts)  # the client asks for base64
    plain = server.http.post("/v1/embeddings", json={"input": texts}).json()
    for theirs, ours in zip(encoded.data, plain["data"]):
        assert np.allclose(theirs.embedding, ours["embedding"], atol=1e-6)
        assert abs(np.linalg.norm(theirs.embedding) - 1) < 1e-5
    assert [one.index for one in encoded.data] == [0, 1, 2]
    assert np.allclose(encoded.data[0].embedding, encoded.data[2].embedding, atol=1e-5)
    assert encoded.usage.prompt_tokens == encoded.usage.total_tokens > 3
    mean = server.http.post("/v1/embeddings", json={"input": texts[0], "pooling": "mean"}).json()
    assert not np.allclose(mean["data"][0]["embedding"], plain["data"][0]["embedding"], atol=1e-2)
    for body, param in [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "x", "dimensions": 8}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "stream": True}, "stream"),
        ({"input": [7] * 2000}, "input"),
    ]:
        answer = server.http.post("/v1/embeddings", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    server.check_conservation()


def test_run_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def line(custom_id: Any, url: str = "/v1/completions", **body: Any) -> str:
        return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})

    lines = [
        line("a", prompt="And", max_tokens=3),
        line("b", "/v1/chat/completions", messages=[{"role": "user", "content": "Who?"}], max_tokens=3),
        line("c", "/v1/embeddings", input="And"),
        line("d", prompt="And", temperature=-1),
        line("a", prompt="And"),
        line("e", "/metrics"),
        line("f", prompt="And", stream=True),
        line(7, prompt="And"),
        "{broken",
        "[]",
        "",
        line("g", "/v1/responses", input="Who?", max_output_tokens=2),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ["--device", "cpu", "--num-threads", "1"]
    assert main(["run-batch", "-i", str(source), "-o", str(target), *options]) == 1
    assert "4 served, 7 failed" in capfd.readouterr().err
    results = [json.loads(text) for text in target.read_text(encoding="utf-8").splitlines()]
    assert len(results) == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    by_id: dict[Any, list[Any]] = {}
    for result in results:
        assert set(result) == {"id", "custom_id", "response", "error"}
        by_id.setdefault(result["custom_id"], []).append(result)
    assert by_id["b"][0]["response"]["body"]["object"] == "chat.completion"
    assert by_id["c"][0]["response"]["body"]["data"][0]["embedding"]
    assert by_id["d"][0]["response"]["status_code"] == 400
    assert by_id["d"][0]["response"]["body"]["error"]["param"] == "temperature"
    assert {one["error"] is None for one in by_id["a"]} == {True, False}
    assert main(["run-batch", "-i", str(tmp_path / "none"), "-o", str(target), *options]) == 2


def test_a_batch_does_not_replace_its_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source, folder = tmp_path / "in.partial", tmp_path / "folder"
    source.write_text("[]\n", encoding="utf-8")
    (tmp_path / "link").symlink_to(source)
    folder.mkdir()
    itself = (source, tmp_path / "in", tmp_path / "link")
    for target, said in (*((path, "is the input") for path in itself), (folder, "is not a regular file")):
        for ray in ([], ["--ray"]):
            assert main(["run-batch", "-i", str(source), "-o", str(target), "--device", "cpu", *ray]) == 2
            assert said in capfd.readouterr().err
    assert source.read_text(encoding="utf-8") == "[]\n"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_part_of_a_batch_is_split_where_its_lines_end(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    body = {"prompt": "a\u2028b\x85c", "echo": True, "max_tokens": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    source.write_text(json.dumps(line) + "\n", encoding="utf-8")
    engine = Engine(source, {"device": "cpu", "num_threads": 1})
    try:
        results = engine({"begin": np.array([0]), "end": np.array([source.stat().st_size])})
    finally:
        engine._llm.shutdown()
    assert results["failed"] == [False]
    assert json.loads(results["text"][0])["response"]["body"]["choices"][0]["text"] == body["prompt"]
