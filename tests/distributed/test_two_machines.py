"""Two machines, as far as the network can tell: ranks in network namespaces of their own, joined by a veth pair.

What runs is the command of the README: torchrun in both. Needs root and iproute2, else it is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PORT = "29500"  # free in a namespace of our own
PROMPTS = ["In the beginning", "And Moses said unto the people", "Blessed are"]
GENERATE = ["generate", "--device", "cpu", "--max-model-len", "256", "--temperature", "0", "-n", "16"]
SERVE_RANK_0 = "from flover.engine import launch, rank; raise SystemExit(rank.join(launch.launched()))"
LONG_RUN = """
import sys, time
from flover import LLM, SamplingParams
llm = LLM(device="cpu", max_model_len=512, tensor_parallel_size=2)
params = SamplingParams(max_tokens=500, ignore_eos=True)
prepared = [llm.engine.prepare(str(i), [1, 2, i + 3], params) for i in range(3)]
for one in prepared:
    llm.engine.add(one)
errors = []
said = False
while llm.engine.has_unfinished_requests():
    for output in llm.engine.step():
        errors += [output.outputs[0].error] if output.finished else []
        if not said:
            print("up", flush=True)
            said = True
print(errors, flush=True)
"""


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@dataclass
class Machines:
    """Two namespaces; machine i has the address `address(i)` on the device `eth`."""

    names: list[str]

    def address(self, machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def start(self, machine: int, command: list[str], environment: dict[str, str] | None = None) -> Any:
        full = ["ip", "netns", "exec", self.names[machine], sys.executable, *command]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        return subprocess.Popen(full, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def torchrun(self, machine: int, arguments: list[str]) -> Any:
        where = ["--nnodes", "2", "--node-rank", str(machine), "--nproc-per-node", "1"]
        where += ["--master-addr", self.address(0), "--master-port", PORT]
        return self.start(machine, ["-m", "torch.distributed.run", *where, "-m", "flover", *arguments])

    def rank(self, machine: int, code: str) -> Any:
        place = {"RANK": str(machine), "WORLD_SIZE": "2", "MASTER_ADDR": self.address(0), "MASTER_PORT": PORT}
        return self.start(machine, ["-c", code], place)


@pytest.fixture
def machines() -> Iterator[Machines]:
    if os.name != "posix" or os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need iproute2")
    names = [f"flover-{os.getpid()}-{i}" for i in range(2)]
    made = Machines(names)
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "eth", "netns", names[0], "type", "veth", "peer", "name", "eth", "netns", names[1])
            for i, name in enumerate(names):
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "address", "add", f"{made.address(i)}/24", "dev", "eth")
                ip("-n", name, "link", "set", "eth", "up")
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def finish(processes: list[Any], seconds: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; kills what runs on."""
    end = time.monotonic() + seconds
    done = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += "\n(killed by the test: it ran on)"
        done.append((process.returncode, out, err))
    return done


def tokens(path: Path) -> list[list[int]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [choice["token_ids"] for row in sorted(rows, key=lambda row: row["index"]) for choice in row["outputs"]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["-tp", "-pp"])
def test_the_same_tokens_across_machines(kind: str, machines: Machines, tmp_path: Path) -> None:
    """Also over a slow link, where the kernel can delay one."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    alone, across = tmp_path / "alone.jsonl", tmp_path / "across.jsonl"
    here = [*GENERATE, "--input", str(prompts), "--output", str(alone)]
    subprocess.run([sys.executable, "-m", "flover", *here], check=True, capture_output=True)
    delay = ["tc", "-n", machines.names[0], "qdisc", "add", "dev", "eth", "root", "netem", "delay", "2ms"]
    delayed = shutil.which("tc") is not None and subprocess.run(delay, capture_output=True).returncode == 0
    there = [*GENERATE, kind, "2", "--input", str(prompts), "--output", str(across)]
    processes = [machines.torchrun(machine, there) for machine in range(2)]
    for code, _, error in finish(processes, 120):
        assert code == 0, error
    print("\ndelayed by 2 ms" if delayed else "\nno delay: the kernel has no netem")
    assert tokens(across) == tokens(alone)


@pytest.mark.slow
def test_a_cut_ends_every_request(machines: Machines) -> None:
    processes = [machines.rank(0, LONG_RUN), machines.rank(1, SERVE_RANK_0)]
    assert processes[0].stdout.readline() == "up\n", finish(processes, 1)
    ip("-n", machines.names[1], "link", "set", "eth", "down")
    started = time.monotonic()
    line = processes[0].stdout.readline()
    seconds = time.monotonic() - started
    (code, _, error), (other, _, other_error) = finish(processes, 15)
    assert line.count("rank 1 has not been heard of for") == 3, (line, error)
    assert seconds < 5
    assert code == 0, error
    assert other == 1, other_error
    assert "ran on" not in error + other_error


@pytest.mark.slow
def test_ranks_with_different_commands_are_refused(machines: Machines) -> None:
    ours, theirs = ([*GENERATE, "-tp", "2", prompt] for prompt in "xy")
    results = finish([machines.torchrun(0, ours), machines.torchrun(1, theirs)], 60)
    assert results[0][0] != 0
    assert "rank 1 has another command" in results[0][2]
