"""An open-loop client of OpenAI endpoints: every request is sent when it is due, whatever the server does.

One event loop, one connection for each request in flight. A request's clock starts when it is due, so that a late
client or a slow server shows in its latency and not in a load that nobody asked for; `Record.sent` says when it was
sent. Under `max_concurrency` the clock starts once there is a place. A token's time is that of its chunk.
"""

from __future__ import annotations

import asyncio
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from flover.bench.records import Job, Record, Watch

PATHS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
KEEP_ALIVE = 4.0  # seconds; uvicorn closes an idle connection after five
POLL = 0.5  # seconds between two looks whether a server is there
SPIN = 1e-3  # seconds before a request is due that the loop is not trusted with
Prompt = Sequence[int] | str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go and what they look like.

    Args:
        url: of the endpoint itself. kind: of PATHS.
        ignore_eos: exactly `Job.num_output` tokens are wanted, and fewer are an error.
        extra: more of every request's body; it wins.
        key: sent as Bearer. timeout: seconds without a byte after which a request has failed.
    """

    url: str
    model: str
    kind: str = "openai"
    ignore_eos: bool = True
    key: str = ""
    timeout: float = 600.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, prompt: Prompt, num_output: int) -> dict[str, Any]:
        """Greedy, streamed, with usage. A chat's prompt is text; a completion's may be token ids."""
        if self.kind == "openai-chat":
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
        else:
            asked = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "return_token_ids": True}  # of vLLM
        return {
            "model": self.model,
            **asked,
            "max_tokens": num_output,
            "temperature": 0,
            "ignore_eos": self.ignore_eos,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


def first_model(base: str, key: str = "", patience: float = 0.0) -> dict[str, Any]:
    """The first that /v1/models lists, with what the server says of it.

    Args:
        patience: seconds that a server may take to be there.

    Raises:
        ValueError: it lists none.
    """
    request = urllib.request.Request(f"{base}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                card: dict[str, Any] = msgspec.json.decode(response.read())["data"][0]
                return {**card, "id": str(card["id"])}
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500  # it is there, and will not
            if refused or time.monotonic() >= until:
                raise ValueError(f"{base}/v1/models gives no model: {' '.join(str(error).split())[:200]}") from None
        time.sleep(POLL)


def drive(
    endpoint: Endpoint,
    jobs: Sequence[Job],
    prompts: Sequence[Prompt],
    max_concurrency: int | None = None,
    watch: Watch = None,
) -> list[Record]:
    """Send all jobs, ascending in arrival; -> their records, when the last has ended.

    Args:
        prompts: one for each job. max_concurrency: requests in flight at most. watch: `records.Watch`.
    """
    return asyncio.run(_drive(endpoint, jobs, prompts, max_concurrency, watch))


async def _drive(
    endpoint: Endpoint,
    jobs: Sequence[Job],
    prompts: Sequence[Prompt],
    max_concurrency: int | None,
    watch: Watch,
) -> list[Record]:
    records = [Record(job.arrival, len(job.prompt)) for job in jobs]
    bodies = [msgspec.json.encode(endpoint.body(prompt, job.num_output)) for job, prompt in zip(jobs, prompts)]
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=endpoint.timeout)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
    if watch is not None:
        watch(records)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        origin = time.monotonic()

        async def one(job: Job, record: Record, body: bytes) -> None:
            await _complete(session, endpoint, job, record, body, origin)
            if places is not None:
                places.release()

        tasks = []
        held_up = 0.0  # until then there was no place
        for job, record, body in zip(jobs, records, bodies):
            await _until(origin + job.arrival)
            if places is not None:
                waits = places.locked()
                await places.acquire()
                held_up = time.monotonic() - origin if waits else held_up
                record.arrival = max(job.arrival, held_up)
            tasks.append(asyncio.create_task(one(job, record, body)))
        await asyncio.gather(*tasks)
    return records


async def _until(when: float) -> None:
    """Sleep, and let the loop turn for the last millisecond; the loop turns once in any case."""
    left = when - time.monotonic()
    await asyncio.sleep(max(0.0, left - SPIN))
    while time.monotonic() < when:
        await asyncio.sleep(0)


async def _complete(
    session: aiohttp.ClientSession, endpoint: Endpoint, job: Job, record: Record, body: bytes, origin: float
) -> None:
    """Fills the record, with an error if need be."""
    record.sent = time.monotonic() - origin
    try:
        async with session.post(endpoint.url, data=body) as response:
            record.status = response.status
            if response.status != 200:
                record.error = f"HTTP Error {response.status}: {_message(await response.read())}"
            else:
                await _stream(response, record, origin)
                if record.error is None and endpoint.ignore_eos and len(record.times) != job.num_output:
                    record.error = f"{job.num_output} tokens were asked for, {len(record.times)} came"
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError, LookupError, TypeError) as error:
        record.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    record.ended = time.monotonic() - origin


async def _stream(response: aiohttp.ClientResponse, record: Record, origin: float) -> None:
    """Tokens that had no text of their own are counted by the usage, at the time of the last."""
    over = False
    async for event in events(response.content.iter_any()):
        now = time.monotonic() - origin
        if event is None:
            over = True
            continue
        if "error" in event:
            record.error = str(event["error"])[:200]
            return
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids") or ()
            record.token_ids += ids
            record.times += [now] * (len(ids) or int(bool(_text(choice))))
            over = over or choice.get("finish_reason") is not None
        usage = event.get("usage") or {}
        record.num_prompt = usage.get("prompt_tokens", record.num_prompt)
        record.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        late = usage.get("completion_tokens", 0) - len(record.times)
        record.times += [record.times[-1] if record.times else now] * late
    if not over:
        record.error = "the stream was cut"


def _text(choice: dict[str, Any]) -> str | None:
    """What a chunk brings, of a completion or a chat (reasoning included)."""
    delta = choice.get("delta") or {}
    found: str | None = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
    return found


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any] | None]:
    """The JSON objects of a stream of server-sent events; None for [DONE]. Comments and other fields are skipped."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                yield None if data == b"[DONE]" else msgspec.json.decode(data)


def _message(body: bytes) -> str:
    """What an error's body says, in one line."""
    with suppress(ValueError, LookupError, TypeError):
        return " ".join(str(msgspec.json.decode(body)["error"]["message"]).split())[:200]
    return " ".join(body.decode(errors="replace").split())[:200]
