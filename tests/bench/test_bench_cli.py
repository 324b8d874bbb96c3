"""`flover bench`, run in this process on the built-in model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flover.bench.records import Job, Record, Run, Watch
from flover.bench.systems import SystemMissing
from flover.cli import bench_run, bench_startup, main

SMALL = ["--max-model-len", "128", "--device", "cpu", "--dtype", "float64"]
LOAD = ["--num-prompts", "5", "--input-len", "8", "--output-len", "6"]


class Fake:
    """Serves a token every 10 ms; tokens and failures to order."""

    def __init__(self, name: str, log: list[Any], interrupt: bool = False, error: str | None = None) -> None:
        self.name, self._log, self._interrupt, self._error = name, log, interrupt, error

    def run(self, jobs: Sequence[Job], watch: Watch = None) -> Run:
        self._log.append((self.name, list(jobs)))
        if self._interrupt and watch is not None:
            raise KeyboardInterrupt
        records = []
        for i, job in enumerate(jobs):
            tokens = [7 if self.name == "fused" and i == 0 else 8] * job.num_output
            times = [job.arrival + 0.01 * (k + 1) for k in range(job.num_output)]
            records.append(Record(job.arrival, len(job.prompt), times, tokens, self._error if i == 1 else None))
        return Run(self.name, records)

    def close(self) -> None:
        self._log.append((self.name, "closed"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What fake systems were given; a third one is not there."""
    entries: list[Any] = []

    def make(name: str, config: Any) -> Fake:
        if name == "transformers":
            raise SystemMissing("transformers is not installed")
        return Fake(name, entries)

    monkeypatch.setattr(bench_run, "make_system", make)
    return entries


def test_throughput(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    args = ["bench", "throughput", *LOAD, *SMALL, "--num-repeats", "2", "--seed", "3", "--goodput", "ttft:60000"]
    monkeypatch.setattr(sys, "argv", ["flover", *args])
    assert main([*args, "--output-json", str(path)]) == 0
    out = capfd.readouterr().out
    assert out.startswith("workload: random, 8 prompt and 6 output tokens, 5 requests, all at once, seed 3\n")
    assert re.search(r"^Successful requests: +5$", out, re.M)
    assert re.search(r"^Total generated tokens: +30$", out, re.M)
    kept = json.loads(path.read_text())
    assert kept["environment"]["command"].startswith("flover bench throughput --num-prompts 5")
    assert {"date", "commit", "python", "torch", "flover", "numpy"} <= kept["environment"].keys()
    assert [run["seed"] for run in kept["runs"]] == [3, 4]
    assert all(len(r["times"]) == 6 for run in kept["runs"] for r in run["requests"])
    low, high = kept["results"]["output_throughput"]["ci95"]
    assert low <= kept["results"]["output_throughput"]["mean"] <= high
    assert kept["settings"]["engine"]["dtype"] == "float64"
    assert kept["settings"]["workload"]["num_prompts"] == 5
    rates = [run["request_goodput"] / run["request_throughput"] for run in kept["runs"]]
    assert rates == [1.0, 1.0]


def test_compare(capfd: pytest.CaptureFixture[str]) -> None:
    args = ["--policy", "serial,fused,dynamic:9ms:2,3", "--random-range-ratio", "0.5", "--request-rate", "200"]
    assert main(["bench", "compare", *LOAD, *SMALL, *args]) == 0
    out = capfd.readouterr().out
    assert "random, 4-12 prompt and 3-9 output tokens, 5 requests, 200 a second (Poisson), seed 0" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert rows["serial"][-1] == "1.00"
    assert "dynamic:9ms:2,3" in rows
    assert rows["fused"][-1] == "100.0%", "float64: the same tokens"
    assert "TPOT 0: no gap between tokens, as in a batch that leaves together" in out


def test_latency(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    args = ["--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1", "--input-len", "4"]
    assert main(["bench", "latency", *args, "--output-len", "4", *SMALL, "--output-json", str(path)]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^Avg latency: 0\.\d{6} seconds ± ", out, re.M)
    assert re.search(r"^99% percentile latency: 0\.\d{6} seconds$", out, re.M)
    kept = json.loads(path.read_text())
    assert len(kept["latencies"]) == 3
    assert kept["percentiles"]["50"] == sorted(kept["latencies"])[1]


def test_every_system_gets_the_same_jobs(log: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    args = ["--policy", "serial,fused,transformers", "--num-repeats", "2", "--output-json", str(path)]
    assert main(["bench", "compare", *LOAD, *SMALL, *args]) == 0
    out = capfd.readouterr().out
    serial, fused = ([jobs for name, jobs in log if name == wanted] for wanted in ("serial", "fused"))
    assert serial == fused
    assert serial[3] == "closed"
    warm_up, first, second = serial[:3]
    assert len({job.prompt for jobs in (warm_up, first, second) for job in jobs}) == 15, "nothing is cached"
    assert re.search(r"^fused .* 80\.0%$", out, re.M), "one of five parts"
    assert "transformers: not measured: transformers is not installed" in out
    kept = json.loads(path.read_text())
    assert kept["systems"]["fused"]["same_tokens_as_serial"] == 0.8
    assert kept["missing"] == {"transformers": "transformers is not installed"}


def test_what_others_did_is_kept_when_one_does_not_fit(
    log: list[Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, config: Any) -> Fake:
        if name.startswith("concurrent"):
            raise ValueError("9999 instances need 39.1 GiB")
        return Fake(name, log)

    monkeypatch.setattr(bench_run, "make_system", make)
    assert main(["bench", "compare", *LOAD, *SMALL, "--policy", "serial,concurrent:9999,fused"]) == 0
    out = capfd.readouterr().out
    assert "concurrent:9999: not measured: 9999 instances need 39.1 GiB" in out
    assert re.search(r"^fused .* 80\.0%$", out, re.M)
    assert "TPOT 0" not in out
    assert main(["bench", "compare", *LOAD, *SMALL, "--policy", "concurrent:9999"]) == 2
    assert capfd.readouterr().err == "flover: error: 9999 instances need 39.1 GiB\n"


def test_interrupted(log: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "make_system", lambda name, config: Fake(name, log, interrupt=True))
    assert main(["bench", "throughput", *LOAD, *SMALL, "--output-json", str(tmp_path / "r.json")]) == 130
    assert log[-1] == ("fused", "closed")
    assert not list(tmp_path.iterdir())


def test_the_bar_counts_tokens_and_requests(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(0.0, (1,), 40) for _ in range(3)]
    records = [Record(0.0, 1) for _ in jobs]
    with bench_run.bar("fused", jobs) as watch:
        watch(records)
    assert capfd.readouterr().err == "", "no terminal"
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bench_run.bar("fused", jobs) as watch:
        watch(records)
        for record in records:
            record.times += [0.0] * 7
    assert "0/3 requests, 21/120 tokens" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capfd.readouterr().err)
    records[0].error, records[1].ended = "out of luck", 1.0
    assert bench_run.tally(jobs, records) == (2, 87)


def test_failed_requests(log: list[Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "make_system", lambda name, config: Fake(name, log, error="out of luck"))
    assert main(["bench", "throughput", *LOAD, *SMALL]) == 1
    out, err = capfd.readouterr()
    assert re.search(r"^Failed requests: +1$", out, re.M)
    assert err == "flover: error: a request failed: fused: out of luck\n"


def test_trace_and_published_lengths(log: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    lines = [{"arrival": 9.0 + i, "prompt_token_ids": [i] * 4, "num_output": 300 if i else 2} for i in range(3)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert main(["bench", "throughput", "--dataset-path", str(path), *SMALL]) == 0
    assert "3 requests, arriving as in the trace, seed 0; 2 shortened to max_model_len=128" in capfd.readouterr().out
    assert [job.arrival for job in log[1][1]] == [0, 1, 2]
    assert log[1][1][0].prompt == (0,) * 4
    assert not {job.prompt for job in log[0][1]} & {job.prompt for job in log[1][1]}, "warmed up on other prompts"
    assert main(["bench", "throughput", "--dataset-name", "azure-conv", "--request-rate", "4", *SMALL]) == 0
    out = capfd.readouterr().out
    assert "32 requests, 4 a second (gamma, burstiness 0.84)" in out
    assert main(["bench", "throughput", "--request-interval", "0.5", *LOAD, *SMALL]) == 0
    assert [job.arrival for job in log[-2][1]] == [0, 0.5, 1, 1.5, 2]


def test_laws_of_lengths(log: list[Any], capfd: pytest.CaptureFixture[str]) -> None:
    laws = ["--input-len", "uniform:3:9", "--output-len", "lognormal:20:70", "--num-prompts", "400"]
    assert main(["bench", "throughput", *laws, *SMALL]) == 0
    out = capfd.readouterr().out
    assert "random, 3-9 prompt and lognormal:20:70 output tokens, 400 requests" in out
    assert "shortened to max_model_len=128" in out
    jobs = log[1][1]
    assert {len(job.prompt) for job in jobs} >= set(range(4, 10))
    outputs = sorted(job.num_output for job in jobs)
    assert (sum(outputs) / 400, outputs[379]) == (pytest.approx(20, rel=0.2), pytest.approx(70, rel=0.25))


def test_a_trace_of_absurd_lengths_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival": 0, "num_prompt": 1000000000000, "num_output": 3}')
    assert main(["bench", "throughput", "--dataset-path", str(path), *SMALL]) == 2
    assert "t.jsonl:1: num_prompt must be a number of tokens, 1 to 10000000, got" in capfd.readouterr().err


def test_startup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    assert main(["bench", "startup", "--num-repeats", "1", *SMALL, "--output-json", str(path)]) == 0
    out = capfd.readouterr().out
    for row in ("imports", "weights", "ready", "first token"):
        assert re.search(rf"^{row} +\d+\.\d{{3}} s +\d+\.\d{{3}} s", out, re.M)
    warm = json.loads(path.read_text())["warm"]
    assert 0 < warm["ready_s"] < warm["first_token_s"] < warm["second_token_s"] <= warm["exit_s"] + 0.1
    monkeypatch.setattr(bench_startup, "fresh", None)
    assert main(["bench", "startup", "--num-repeats", "0"]) == 2


def test_workloads_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "workloads"]) == 0
    assert "azure-conv" in capfd.readouterr().out
    assert main(["bench"]) == 0
    assert "throughput" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["throughput", "--policy", "fusd"], "unknown system 'fusd'; did you mean 'fused'?; known: serial"),
        (["compare", "--policy", "serial,nope"], "unknown system 'nope'"),
        (["compare", "--policy", "serial,dynamic:50ms:4,x"], "unknown system 'x'"),
        (["throughput", "--policy", "dynamic:50ms:x"], "'dynamic:50ms:x' needs a delay over 0 and sizes"),
        (["compare", "--policy", ","], "--policy names nothing to compare"),
        (["throughput", "--dataset-name", "sharegtp"], "did you mean 'sharegpt'?"),
        (["throughput", "--dataset-name", "trace"], "needs --dataset-path"),
        (["throughput", "--dataset-path", "/none.jsonl"], "/none.jsonl: No such file"),
        (
            ["throughput", "--dataset-name", "chat", "--dataset-path", "x"],
            "--dataset-name trace or custom, got chat",
        ),
        (["throughput", "--dataset-name", "custom", "--dataset-path", "x"], "a trace of prompt_token_ids works"),
        (["throughput", "--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["throughput", "--num-repeats", "0"], "--num-repeats must be at least 1"),
        (["throughput", "--input-len", "0"], "--input-len must be tokens (1 to 10000000) such as 128, uniform:"),
        (["throughput", "--input-len", "10000000000000"], "--input-len must be tokens"),
        (["compare", "--policy", "nope", "--policy", "serial"], "unknown system 'nope'"),
        (["throughput", "--output-len", "zipf:1:2"], "--output-len must be tokens"),
        (["throughput", "--output-len", "uniform:9:2"], "--output-len uniform:9:2: a range of lengths must be 1 <= lo"),
        (["throughput", "--output-len", "lognormal:200:900"], "--output-len lognormal:200:900: no lognormal"),
        (["throughput", "--input-len", "uniform:2:9", "--random-range-ratio", "0.5"], "goes with lengths such as 128"),
        (["throughput", "--burstiness", "0.5"], "--burstiness 0.5 needs --request-rate"),
        (["throughput", "--burstiness", "0.5", "--request-rate", "0"], "the request rate must be over 0"),
        (["throughput", "--burstiness", "2", "--request-interval", "0"], "excludes --request-rate and --burstiness"),
        (["latency", "--batch-size", "0"], "'--batch-size'"),
        (["throughput", "--input-len", "5000"], "a prompt of 5000 and an output of 128 tokens do not fit"),
        (["throughput", "--random-range-ratio", "1"], "below 1, got 1.0"),
        (["throughput", "--request-rate", "-1"], "the request rate must be over 0"),
        (["throughput", "--request-rate", "1", "--burstiness", "0"], "burstiness must be over 0"),
        (["throughput", "--request-interval", "1", "--request-rate", "1"], "excludes --request-rate"),
        (["throughput", "--goodput", "p99:5"], "NAME:MILLISECONDS"),
        (["throughput", "--output-json", "/none/r.json"], "folder /none does not exist"),
        (["throughput", "--output-json", "/proc/r.json"], "--output-json: /proc/r.json cannot be written: "),
        (["latency", "--output-json", "/proc/r.json"], "--output-json: /proc/r.json cannot be written: "),
        (["compare", "--output-json", "/proc/r.json"], "--output-json: /proc/r.json cannot be written: "),
        (["startup", "--output-json", "/proc/r.json"], "--output-json: /proc/r.json cannot be written: "),
        (["report", "/proc", "--output", "/proc/r.html"], "--output: /proc/r.html cannot be written: "),
        (["latency", "--num-iters", "0"], "--num-iters must be at least 1"),
        (["throughput", "--dtype", "float1"], "dtype must be one of"),
        (["startup", "--model", "nowhere-at-all"], "nowhere-at-all"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("flover: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == "", "before anything ran"
