"""Start-up in fresh processes: from the creation of a process to its first token, by phase.

A process loads a model, answers one prompt of token ids, and reports `LLM.startup_times` and the age at which its first
and second token were there; the second is the first of decode. Its Triton cache is a folder of the caller's: empty, or
as another process left it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

PROMPT = 32  # tokens


def fresh(options: Mapping[str, Any], cache: str) -> dict[str, Any]:
    """Measure one process.

    Args:
        options: fields of EngineConfig. cache: folder of the Triton cache.

    Returns:
        `phases_s` (seconds by phase), `nbytes` (of the phases that moved or took some), `ready_s`, `first_token_s`,
        `second_token_s` (ages of the process), `exit_s` (how long it lived), `device`.

    Raises:
        ValueError: it failed; its last words.
    """
    command = [sys.executable, "-m", "flover.bench.startup", json.dumps(dict(options))]
    begin = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"a measured process failed: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "exit_s": round(time.perf_counter() - begin, 3)}


def child(options: Mapping[str, Any]) -> dict[str, Any]:
    """In the fresh process."""
    from flover import LLM, SamplingParams
    from flover.startup import process_age

    with LLM(**options) as llm:
        ready = process_age()
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        ages = [process_age() for _ in llm.stream({"prompt_token_ids": list(range(1, PROMPT + 1))}, params)]
        times = llm.startup_times
        return {
            "phases_s": {name: round(seconds, 3) for name, seconds in times.seconds.items()},
            "nbytes": dict(times.nbytes),
            "ready_s": round(ready, 3),
            "first_token_s": round(ages[0], 3),
            "second_token_s": round(ages[1], 3),
            "device": llm.engine.core.resolved.engine.device,
        }


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))), flush=True)
