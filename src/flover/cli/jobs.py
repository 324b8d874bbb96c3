"""`--input` and `--output`: prompts from JSON lines, results to JSON lines that an interrupted run can be resumed from.

Invariants: nothing runs before every input line has been checked; an output file holds whole lines only, each on disk
before the next is begun.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flover.engine.llm_engine import Prepared
from flover.llm import LLM
from flover.request import RequestOutput, TokenLogprobs
from flover.sampling_params import SamplingParams
from flover.show import nearest

KINDS = ("prompt", "prompt_token_ids", "messages")
KEYS = {*KINDS, "id", "sampling_params", "arrival_step"}


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to run, and the place it came from for messages."""

    index: int
    request_id: str
    prompt: Any  # as LLMEngine takes it; {"messages": [...]} is a conversation
    sampling: Mapping[str, Any]  # on top of the command line's
    arrival_step: int = 0
    where: str = ""

    def prepare(self, llm: LLM, base: SamplingParams) -> Prepared:
        """Every check; ValueError names file and line."""
        try:
            params = SamplingParams.from_dict(self.sampling, base)
            prompt = self.prompt
            if "messages" in prompt:
                prompt = llm.chat_prompt(prompt["messages"])
            return llm.engine.prepare(self.request_id, prompt, params)
        except ValueError as error:
            raise ValueError(f"{self.where}{error}") from None


def prompt_jobs(prompts: Sequence[str]) -> list[Job]:
    """Prompts of the command line."""
    many = len(prompts) > 1
    return [
        Job(i, str(i), {"prompt": text}, {}, where=f"prompt {i}: " if many else "") for i, text in enumerate(prompts)
    ]


def read_jobs(path: Path) -> list[Job]:
    """Jobs of a JSON lines file (empty lines are skipped); ValueError names file and line."""
    jobs: list[Job] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}: "
        try:
            job = _job(len(jobs), json.loads(line), where)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}{error}") from None
        if job.request_id in seen:
            raise ValueError(f"{where}id {job.request_id!r} is that of line {seen[job.request_id]} already")
        if job.request_id:
            seen[job.request_id] = number
        jobs.append(job)
    if not jobs:
        raise ValueError(f"{path} holds no prompt")
    return [job if job.request_id else replace(job, request_id=_free(str(job.index), seen)) for job in jobs]


def _free(name: str, taken: Mapping[str, int]) -> str:
    """The id of a line that gives none."""
    while name in taken:
        name += "_"
    return name


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def _job(index: int, entry: Any, where: str) -> Job:
    if not isinstance(entry, dict):
        raise ValueError(f"a line must be a JSON object, got {entry!r}")
    for key in entry:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}{nearest(key, KEYS)}")
    prompt = {key: entry[key] for key in KINDS if key in entry}
    if len(prompt) != 1:
        raise ValueError(f"give exactly one of {', '.join(KINDS)}, got {', '.join(prompt) or 'none'}")
    sampling, arrival = entry.get("sampling_params", {}), entry.get("arrival_step", 0)
    if not isinstance(sampling, dict):
        raise ValueError(f"sampling_params must be an object, got {sampling!r}")
    if isinstance(arrival, bool) or not isinstance(arrival, int) or arrival < 0:
        raise ValueError(f"arrival_step must be an integer of at least 0, got {arrival!r}")
    request_id = entry.get("id", "")
    if isinstance(request_id, bool) or not isinstance(request_id, (str, int)) or ("id" in entry and request_id == ""):
        raise ValueError(f"id must be a non-empty string, got {request_id!r}")
    return Job(index, str(request_id), prompt, sampling, arrival, where)


BEGINNING = b'{"index": '  # of every line that `OutputFile` writes


class OutputFile:
    """Finished outputs, one JSON line each, appended and synced as they come. `done`: indices of those there.

    Raises:
        ValueError: a line of an existing file that is no result of these jobs.
    """

    def __init__(self, path: Path, jobs: Sequence[Job]) -> None:
        self.path = path
        self.done: set[int] = set()
        self._index = {job.request_id: job.index for job in jobs}
        end = 0
        if path.exists():
            if not path.is_file():
                raise ValueError(f"{path} is not a regular file")
            for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
                if not line.endswith(b"\n") and (line.startswith(BEGINNING) or BEGINNING.startswith(line)):
                    break  # torn by an interruption: written again
                self.done.add(self._check(line, jobs, f"{path}:{number}"))
                end += len(line)
        self._file = path.open("ab")
        self._file.truncate(end)

    @staticmethod
    def _check(line: bytes, jobs: Sequence[Job], where: str) -> int:
        try:
            entry = json.loads(line)
            job: Job = jobs[entry["index"]]
            kinds = [kind for kind in ("prompt", "prompt_token_ids") if kind in job.prompt]
            if entry["id"] == job.request_id and all(entry[kind] == job.prompt[kind] for kind in kinds):
                return job.index
        except (ValueError, KeyError, IndexError, TypeError):
            pass
        raise ValueError(f"{where} is no result of this input: give another --output, or remove it")

    def write(self, output: RequestOutput) -> None:
        """One whole line, on disk when this returns."""
        entry: dict[str, Any] = {
            "index": self._index[output.request_id],
            "id": output.request_id,
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "outputs": [asdict(choice) for choice in output.outputs],
            "prompt_logprobs": [_plain(each) for each in output.prompt_logprobs or ()] or None,
            "num_cached_tokens": output.num_cached_tokens,
        }
        line = json.dumps({key: value for key, value in entry.items() if value is not None}, ensure_ascii=False)
        self._file.write(line.encode("utf-8", "replace") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(entry["index"])

    def close(self) -> None:
        self._file.close()


def _plain(logprobs: TokenLogprobs | None) -> dict[str, Any] | None:
    return None if logprobs is None else {str(token_id): asdict(entry) for token_id, entry in logprobs.items()}
