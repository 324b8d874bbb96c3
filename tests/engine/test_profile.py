"""`flover.bound`, `flover.profile`, `flover profile` and the parts of benchmarks/gpu.py, on a CPU and a tiny model."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flover.anatomy import PRODUCT
from flover.bench.workload import Lognormal
from flover.bound import Bound, Limits, measured_limits
from flover.cli import main
from flover.config import EngineConfig
from flover.engine.engine import EngineCore
from flover.profile import HostClock, decoding, profile_decode, profile_prefill, timed_steps

LIMITS = Limits(bandwidth=1e9, flops=1e11)


@pytest.fixture(scope="module")
def core() -> Iterator[EngineCore]:
    made = EngineCore(EngineConfig(device="cpu", max_model_len=256, max_num_seqs=4))
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    import gpu

    yield gpu
    sys.path.remove(folder)


def test_bound_counts_what_a_step_reads(core: EngineCore) -> None:
    model, bound = core.resolved.model, Bound(core, LIMITS)
    hidden, size = model.hidden_size, model.hf["intermediate_size"]
    kv = model.num_kv_heads * model.head_dim
    layer = hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * size
    linear = model.num_layers * layer + hidden * model.vocab_size  # tied or not, the head is read, the embedding is not
    norms = (2 * model.num_layers + 1) * hidden
    assert bound.weight_bytes == 4 * (linear + norms)
    assert sum(count for _, count in bound.products) == linear
    assert len(bound.products) == 4 * model.num_layers + 1
    assert sum(bound.kv_bytes) == core.resolved.kv.bytes_per_token
    reading = bound.weight_bytes / 1e9
    assert bound.decode(1, 100) == pytest.approx(reading + 100 * sum(bound.kv_bytes) / 1e9)
    many = 10**6
    assert bound.decode(many, 0) == pytest.approx(2 * bound.parameters * many / 1e11)  # bound by arithmetic
    one = bound.trace([(64, 1)])
    assert one == pytest.approx(bound.prefill(1, 64) + reading + 64.5 * sum(bound.kv_bytes) / 1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.usefixtures("quick")
def test_limits_are_measured_in_any_type(dtype: torch.dtype) -> None:
    limits = measured_limits("cpu", dtype)
    assert limits.bandwidth > 1e8
    assert limits.flops > 1e8


def test_steady_steps_in_full(core: EngineCore) -> None:
    profile = profile_decode(core, Bound(core, LIMITS), batch=3, context=20, steps=5)
    found = profile.anatomy
    assert not core.has_unfinished()
    assert found.between_us is not None
    assert found.steps == 5
    products = next(row for row in found.sums if row.kind == PRODUCT)
    assert products.launches == 4 * core.resolved.model.num_layers + 1
    assert next(row for row in found.kernels if row.kind == PRODUCT).tb_per_s == pytest.approx(products.tb_per_s)
    assert profile.context > 20
    assert profile.share_of_bound == pytest.approx(profile.bound_ms / profile.step_ms)
    host = profile.host_us
    assert min(host["schedule"], host["submit"], host["update"]) > 0
    assert host["host"] + host["wait"] == pytest.approx(profile.step_ms * 1e3)
    assert found.span_us == pytest.approx(found.busy_us + found.gaps_us)


def test_prefill_is_never_cached(core: EngineCore) -> None:
    profile = profile_prefill(core, Bound(core, LIMITS), 200)
    again = profile_prefill(core, Bound(core, LIMITS), 200)
    for each in (profile, again):
        products = next(row for row in each.anatomy.sums if row.kind == PRODUCT)
        assert products.launches == 4 * core.resolved.model.num_layers + 1
        assert each.anatomy.between_us is None
    assert not core.has_unfinished()


def test_batches_that_cannot_be_profiled(core: EngineCore) -> None:
    bound = Bound(core, LIMITS)
    with pytest.raises(ValueError, match="max_num_seqs=5"):
        profile_decode(core, bound, 5, 20, 5)
    with pytest.raises(ValueError, match="max_model_len=256"):
        profile_decode(core, bound, 1, 250, 5)
    small = EngineCore(EngineConfig(device="cpu", max_model_len=64, policy="serial"))
    try:
        with pytest.raises(ValueError, match="never decode in one batch"):
            profile_decode(small, Bound(small, LIMITS), 2, 16, 4)
        assert not small.has_unfinished()
    finally:
        small.shutdown()


def test_host_clock_leaves_nothing_behind(core: EngineCore) -> None:
    with decoding(core, 2, 8, 20), HostClock(core) as clock:
        timed_steps(core, 2, 4)
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert not {"schedule", "update"} & set(vars(core.scheduler))
    assert "submit" not in vars(core._executor)


# ---- flover profile --------------------------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--max-model-len", "128", "--max-num-seqs", "4", "--context", "16", "--steps", "3"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flover.bound.CPU_SUM_BYTES", 1 << 22)


@pytest.mark.usefixtures("quick")
def test_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    assert main(["profile", "--batch", "1,2", "--prefill", "24", "--output", str(file), *SMALL]) == 0
    out, err = capfd.readouterr()
    assert "flover" not in err  # torch's profiler may say that it starts
    printed = out.splitlines()
    assert max(len(line) for line in printed[:-1]) <= 80
    assert sum(line.startswith("matrix products") for line in printed) == 3
    assert "launches" in out
    assert "decode, batch 2, context " in out
    result = json.loads(file.read_text())
    assert [(p["phase"], p["batch"]) for p in result["profiles"]] == [("decode", 1), ("decode", 2), ("prefill", 1)]
    assert all(p["anatomy"]["kernels"] and p["bound_ms"] > 0 for p in result["profiles"])
    assert result["measured_TB_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1,x"], "--batch must be numbers of rows"),
        (["--batch", "0"], "--batch must be numbers of rows"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--output", "/proc/r.json"], "--output: /proc/r.json cannot be written: "),
        (["--output", "nowhere/at/all.json"], "folder nowhere/at does not exist"),
        (["--batch", "9"], "needs max_num_seqs=9"),
        (["--batch", "1", "--context", "99999"], "a context of 99999 and"),
        (["--batch", "1", "--prefill", "128"], "--prefill must be below max_model_len=128"),
    ],
)
def test_command_mistakes(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = import_module("flover.cli.profile")  # by its name it may be the function of `flover.cli`
    monkeypatch.setattr(command, "measured_limits", None)  # mistakes show before it is called
    assert main(["profile", *SMALL, *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, message in err) == ("", True)
    assert err.count("\n") == 1


# ---- benchmarks/gpu.py -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_every_part_runs(benchmark: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "tiny.json"
    parts = [part for part in benchmark.PARTS if part != "transformers"]  # needs a GPU
    small = ["--model", "tiny", "--device", "cpu", "--scale", "64", "--batches", "1,2", "--saturated", "2"]
    threads = torch.get_num_threads()
    benchmark.main([*small, "--only", ",".join(parts), "--output", str(file)])
    assert torch.get_num_threads() == threads
    result = json.loads(file.read_text())
    assert all(result[part] for part in parts)
    assert [row["requests_per_s"] for row in result["poisson"]] == [4, 16, 32]
    assert set(result["modes"]) >= {"mixed", "separate"}
    assert result["fusion"]["ratio"] > 0
    assert result["saturated"]["share_of_bound"] > 0


def test_settings_of_another_version(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "decode,nothing"])
    assert "unknown part nothing" in capsys.readouterr().err
    given = benchmark.parse([]).given
    assert given == {}  # passed on only if given


def test_lognormal_has_the_mean_and_tail_asked_for(benchmark: ModuleType) -> None:
    from _gpu_loads import poisson_trace

    for mean, p95 in ((200, 700), (180, 500)):
        law = Lognormal.of(mean, p95)
        assert math.exp(law.mu + law.sigma**2 / 2) == pytest.approx(mean)
        assert math.exp(law.mu + statistics.NormalDist().inv_cdf(0.95) * law.sigma) == pytest.approx(p95)
        assert law.sigma < 1.6449  # the smaller root
    with pytest.raises(ValueError, match="no lognormal"):
        Lognormal.of(100, 500)
    lengths, arrivals = poisson_trace(16, 4000, 1900)
    assert all(n >= 1 and m >= 1 and n + m <= 1900 for n, m in lengths)
    assert arrivals[-1] == pytest.approx(250, rel=0.05)
    assert statistics.fmean(n for n, _ in lengths) == pytest.approx(200, rel=0.1)
    assert poisson_trace(16, 4, 1900) == poisson_trace(16, 4, 1900)
