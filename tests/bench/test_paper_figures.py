"""`flover bench paper` at a micro scale: every figure, resumption, gaps, and the theory behind the bounds."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flover.bench import keep, paper
from flover.bench.figures import context, headline, lengths, progress, reorder, servers
from flover.bench.figures.context import Bench
from flover.bench.figures.digests import agree, curves_of, seconds_by_rows, step_spans, total
from flover.bench.figures.memory import kv_curve
from flover.bench.figures.pieces import Pieces
from flover.bench.figures.reorder import INDEX_SELECT
from flover.bench.figures.scale import SHAPES, TINY, Bytes
from flover.bench.figures.theory import arrival_bound, queue_ends, simulate
from flover.bench.plans import PLANS
from flover.bench.records import Job, Record, Run
from flover.bench.report import report
from flover.cli import main
from flover.config import DTYPE_BYTES
from flover.metrics import StepStats
from flover.model_config import ModelConfig

MICRO = replace(
    TINY,
    name="micro",
    num_output=4,
    requests=(1, 2),
    draws=2,
    repeats=1,
    poisson_ms=(20, 5000),
    fixed_requests=(1, 2),
    fixed_batches=(1,),
    lower=2,
    upper={2: (4,)},
    tp=(4, (2,)),
    lens=(512,),
    slots=(32, 64),
    traces=2,
    processes=0,
    runs=1,
)
KEYS = {"id", "title", "paper", "ours", "environment", "command", "seed", "scale", "verdict", "notes", "rows", "gaps"}


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "SCALES", {"micro": MICRO})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All figures, made once."""
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "SCALES", {"micro": MICRO})
        paper.run_figures([], folder, "micro", device="cpu", say=lambda _: None)
    return folder


def stored(folder: Path, name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return data


@pytest.mark.parametrize("name", paper.FIGURES)
def test_every_figure_says_what_it_must(folder: Path, name: str) -> None:
    data = stored(folder, name)
    assert data.keys() >= KEYS
    assert (data["id"], data["scale"], data["seed"]) == (name, "micro", 0)
    assert data["verdict"].split()[0].strip(":") in ("Reproduced", "Partly", "No", "Gap")
    assert all(isinstance(value, int | float | str | None) for row in data["rows"] for value in row.values())
    assert len({tuple(row) for row in data["rows"] if row.get("system") != "serial"}) <= 2  # one table
    assert data["environment"]["torch"]
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_a_timeline(folder: Path, tmp_path: Path) -> None:
    report(folder, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert re.search(r"memory-timeline: rows over steps</h2>\s*<p>The running batch: 32 requests", page)


@pytest.mark.parametrize("name", [name for name in paper.FIGURES if name != "reorder"])
def test_tokens_are_those_of_serial(folder: Path, name: str) -> None:
    data = stored(folder, name)
    assert data["same_tokens_as_serial"]["share_identical"] == 1
    assert data["same_tokens_as_serial"]["requests"] == sum(row["requests"] for row in data["tokens"]) > 0


def test_models_that_a_scale_lacks_are_gaps(folder: Path) -> None:
    assert {gap["model"] for gap in stored(folder, "4a")["gaps"]} == {"llama-33b", "llama-65b"}
    cores = os.cpu_count() or 1
    assert {row["ranks"] for row in stored(folder, "tp")["rows"]} == {n for n in (1, 2, 4, 8) if n <= cores}
    assert [gap["ranks"] for gap in stored(folder, "tp")["gaps"]] == [n for n in (2, 4, 8) if n > cores]


def test_nothing_is_made_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "_make", lambda *_: pytest.fail("made again"))
    lines: list[str] = []
    done = paper.run_figures(["4a", "reorder"], folder, "micro", device="cpu", say=lines.append)
    assert done == 2
    assert [line for line in lines if "kept" in line] == [
        "4a: kept from an earlier run",
        "reorder: kept from an earlier run",
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells in the order in which they run."""
    lines: list[str] = []
    init = Bench.__init__

    def listening(self: Bench, *args: Any, say: Any, **options: Any) -> None:
        init(self, *args, say=lambda line: lines.append(line.partition(": about")[0]), **options)

    monkeypatch.setattr(Bench, "__init__", listening)
    return lines


@pytest.mark.slow
def test_an_interrupted_run_loses_one_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    keep = Pieces.keep

    def interrupted(self: Pieces, *args: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        return keep(self, *args)

    options: dict[str, Any] = {"device": "cpu", "models": ["gptj-6b"], "say": lambda _: None}
    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            paper.run_figures(["4b"], tmp_path, "micro", **options)
    assert not (tmp_path / "4b.json").exists()
    assert [cell.partition(",")[0] for cell in asked] == [
        "serial-gptj-6b-4-tokens",
        "headline-gptj-6b-fused",
        "headline-gptj-6b-fused",
    ]
    assert paper.run_figures(["4b"], tmp_path, "micro", **options) == 1
    assert asked[2] == asked[3]  # what was interrupted; what came before it is not run again
    assert len(set(asked)) == len(asked) - 1
    count = len(asked)
    paper.run_figures(["4a"], tmp_path, "micro", **options)
    assert len(asked) == count  # of the same cells
    data = stored(tmp_path, "4a")
    assert {row["model"] for row in data["rows"]} == {"gptj-6b"}
    assert "llama-13b was not asked for" in json.dumps(data["gaps"])
    paper.run_figures(["4a"], tmp_path, "micro", **{**options, "models": ["llama-13b"]})
    assert {row["model"] for row in stored(tmp_path, "4a")["rows"]} == {"gptj-6b", "llama-13b"}  # one folder, in slices
    paper.run_figures(["4a"], tmp_path, "micro", seed=1, **options)
    assert len(asked) > 2 * count  # other jobs


def test_an_interruption_says_that_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pieces, "keep", interrupted)
    arguments = ["--scale", "micro", "--figure", "8", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["bench", "paper", *arguments]) == 130
    assert f"what was measured is in {tmp_path}, and the same command goes on" in capsys.readouterr().out


def test_a_device_out_of_memory_is_a_gap_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_runs", full)
        assert paper.run_figures(["8", "reorder"], tmp_path, "micro", device="cpu", say=lambda _: None) == 1
    assert stored(tmp_path, "8")["verdict"] == "Gap: out of memory: CUDA out of memory. Tried"
    paper.run_figures(["8"], tmp_path, "micro", device="cpu", say=lambda _: None)
    assert stored(tmp_path, "8")["complete"]


def test_a_budget_leaves_cells_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    """Time for the serial runs and two cells of fused."""
    options: dict[str, Any] = {"device": "cpu", "models": ["gptj-6b"], "say": lambda _: None}
    with monkeypatch.context() as patch:
        patch.setattr(context.Budget, "holds", lambda *_: len(asked) < 3)
        assert paper.run_figures(["4a", "8"], tmp_path, "micro", **options) == 1
    data = stored(tmp_path, "4a")
    assert len(asked) == 3
    assert not data["complete"]
    assert sum(bool(row["fused_s"]) for row in data["rows"]) == 2
    assert {row["best_of"] for row in data["rows"]} == {"serial"}
    assert "the budget has no time for it" in json.dumps(data["gaps"])
    assert stored(tmp_path, "8")["gap"] == "no draw is measured"
    for path in (tmp_path / "pieces").glob("*.json"):
        path.write_text(re.sub('"commit": [^,]*', '"commit": "0ld"', path.read_text()))
    monkeypatch.setattr(sys, "argv", ["flover", "bench", "paper", "--budget", "9", "--output", "x"])
    monkeypatch.setattr(keep, "_commit", lambda: "new")
    paper.run_figures(["4a", "8"], tmp_path, "micro", **options)
    data = stored(tmp_path, "4a")
    assert data["environment"]["commit"] == "0ld, new", "of all cells"
    assert data["command"] == "flover bench paper --output x", "which makes all of it"
    assert len(set(asked)) == len(asked) > 10
    assert all(row["fused_s"] and row["concurrent_s"] for row in stored(tmp_path, "4a")["rows"])
    assert stored(tmp_path, "8")["complete"]


def test_no_budget_measures_nothing(tmp_path: Path, asked: list[str]) -> None:
    lines: list[str] = []
    assert paper.run_figures([], tmp_path, "micro", device="cpu", budget=0, say=lines.append) == 0
    assert not asked
    estimates = [line.partition(" s:")[0] for line in lines if ": about " in line]
    assert {line.partition(":")[0] for line in estimates} == set(paper.FIGURES) - {"4b", "4c"}  # those share 4a's cells


def test_what_does_not_fit_is_a_gap_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("the weights take 130 GiB but only 100 GiB is free")

    monkeypatch.setattr(context, "resolve", refuse)
    monkeypatch.setattr(servers, "make_system", lambda *_: pytest.fail("loaded"))
    names = [name for name in paper.FIGURES if name != "reorder"]
    assert paper.run_figures(names, tmp_path, "micro", device="cpu", say=lambda _: None) == 0
    for name in names:
        data = stored(tmp_path, name)
        assert "only 100 GiB is free" in data["verdict"], name
        assert "only 100 GiB is free" in json.dumps(data["gaps"]), name


@pytest.mark.slow
def test_a_system_that_is_absent_is_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = servers.make_system

    def some(name: str, config: Any) -> Any:
        if name.startswith("concurrent"):
            raise ImportError("no such package")
        return make(name, config)

    monkeypatch.setattr(servers, "make_system", some)
    names = ["4a", "progress", "fixed", "random"]
    assert paper.run_figures(names, tmp_path, "micro", device="cpu", say=lambda _: None) == 4
    for name in names:
        assert "no such package" in json.dumps(stored(tmp_path, name)["gaps"])
        assert (tmp_path / f"{name}.png").exists()


def test_an_outside_engine_that_is_absent_is_a_gap(folder: Path, tmp_path: Path, asked: list[str]) -> None:
    name = "openai:http://127.0.0.1:9"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    paper.run_figures(["4a", "progress"], tmp_path, "micro", device="cpu", outside=[name], say=lambda _: None)
    for data in (stored(tmp_path, "4a"), stored(tmp_path, "progress")):
        assert "http://127.0.0.1:9/v1/models gives no model" in json.dumps(data["gaps"])
        assert data["rows"]
        assert data["complete"]
    assert {row[f"{name}_s"] for row in stored(tmp_path, "4a")["rows"]} == {None}
    assert not asked  # the rest is there


def test_pictures_need_only_the_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "4a.json").write_text((folder / "4a.json").read_text())
    assert main(["bench", "paper", "--output", str(tmp_path), "--draw"]) == 0
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["4a.png", "headline.png"]
    lines = (tmp_path / "headline.md").read_text().splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]][:2] == [
        ["| gptj-6b", "0.089 of single", "2"],
        ["| gptj-6b", "0", "2"],
    ]
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert main(["bench", "paper", "--output", str(tmp_path), "--draw", "--figure", "8"]) == 2
    assert "has no 8.json" in capsys.readouterr().err


def test_without_matplotlib_there_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "find_spec", lambda _: None)
    lines: list[str] = []
    assert paper.run_figures(["reorder"], tmp_path, "micro", device="cpu", say=lines.append) == 1
    assert sum("matplotlib" in line for line in lines) == 1
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--figure", "memry"], "unknown figure 'memry'; did you mean 'memory'?; known"),
        (["--device", "tpu"], "device must be one of auto, cpu, cuda, got 'tpu'"),
        (["--figure", "5x"], "unknown figure '5x'; known: 4a, 4b, 4c, progress, 8, fixed, random, reorder, memory, tp"),
        (["--scale", "huge"], "scale must be one of"),
        (["--outside", "vllm"], "--outside 'vllm' is not an outside system: transformers"),
        (["--outside", "transformers:fast"], "unknown system 'transformers:fast'"),
        (["--outside", "fused"], "--outside 'fused' is not an outside system"),
        (["--output", "/proc"], "--output: /proc/headline.md cannot be written: "),
        (["--model", "gpt5"], "unknown model 'gpt5'; known: gptj-6b"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--scale", "micro", *options]
    assert main(["bench", "paper", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("concurrent", "fused", "said"),
    [
        (80.0, 6.85, "Reproduced: at 32 requests gptj-6b 8.4x over serial, the better baseline (99% of the 8.5x that"),
        (
            44.7,
            6.85,
            "Partly: at 32 requests gptj-6b 8.4x over serial (99% of the 8.5x that arrivals allow), 6.5x over",
        ),
        (44.7, 9.0, "No: at 32 requests gptj-6b 6.4x over serial (75% of the 8.5x that arrivals allow), 5.0x over"),
        (
            None,
            6.85,
            "Partly: at 32 requests gptj-6b 8.4x over serial (99% of the 8.5x that arrivals allow), concurrent",
        ),
    ],
)
def test_the_word_of_4a_follows_its_rule(concurrent: float | None, fused: float, said: str) -> None:
    row: dict[str, Any] = {"model": "gptj-6b", "requests": 32, "serial_s": 57.6, "fused_s": fused}
    row |= {"concurrent_s": concurrent, "x_over_concurrent": concurrent and concurrent / fused, "bound_arrivals": 8.51}
    verdict = headline._verdict_4a([row])
    assert verdict.startswith(said)
    assert ("over concurrent, the better baseline (paper 10.9x)" in verdict) == (concurrent == 44.7)
    assert ("concurrent not measured (paper 10.9x)" in verdict) == (concurrent is None)
    assert ("1.29 times as fast as serial here and were 0.78 times in the paper" in verdict) == (concurrent == 44.7)
    assert ("What is missing to the arrivals' bound" in verdict) == (fused == 9.0)


@pytest.mark.parametrize(("gain", "word"), [(1.4, "Reproduced"), (1.1, "Partly"), (1.0, "No")])
def test_the_word_of_tp_follows_its_rule(gain: float, word: str) -> None:
    rows = [{"ranks": 1, "gain": 1.5, "gain_by_bytes": 1.2, "gain_by_rows": 1.6}]
    rows += [{"ranks": 2, "gain": g, "gain_by_bytes": 1.02, "gain_by_rows": 1.7} for g in (gain, 1.5)]
    verdict = lengths._tp_verdict(rows, 1000, (16,))
    assert verdict.startswith(f"{word}: gains of move over off, at 16 requests of up to 1000 tokens: 1.50 on 1 rank (")
    assert f"; {gain:.2f}, 1.50 on 2 ranks (bytes predict 1.02, 1.02); in the paper 1.46 to 3.30" in verdict
    assert verdict.endswith("the gains would be 1.60 to 1.70.")


@pytest.mark.parametrize(("end", "half", "word"), [(1.0, 1.0, "Reproduced"), (1.0, 3.0, "Partly"), (3.0, 3.0, "No")])
def test_progress_may_fail(end: float, half: float, word: str) -> None:
    rows = [{"system": name, "end_x": 2.0, "half_x": 2.0} for name in ("dynamic 2 s", "concurrent")]
    assert progress._progress_verdict([{"system": "fused", "end_x": end, "half_x": half}, *rows]).startswith(f"{word}:")


@pytest.mark.parametrize(
    ("call", "trace", "said"), [(9, 9, "Reproduced: call by call no"), (5, 9, "Partly: call by call a"), (5, 5, "No: ")]
)
def test_reorder_may_fail(call: int, trace: int, said: str) -> None:
    others = dict.fromkeys((*PLANS, INDEX_SELECT), trace) | {"ours": 7}
    traces = [{"max_len": 1, "pace": "", "plan": p, "tokens": n, "traces_worse": 0} for p, n in others.items()]
    calls = [{"slots": 1, "dead": 0, "plan": p, "tokens": n, "us": 1} for p, n in (others | {"paper": call}).items()]
    assert reorder._verdict(traces, calls).startswith(said)


def test_memory_may_fail(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "memory.json").unlink()
    for mode in ("move", "indirect", "paged"):
        path = tmp_path / "pieces" / f"memory-llama-13b-fused-{mode}.json"
        piece = json.loads(path.read_text())
        run = piece["cells"][""]["data"]
        run["curve"][-1][2] = run["reserved_peak"] - (mode == "move")
        path.write_text(json.dumps(piece))
    paper.run_figures(["memory"], tmp_path, "micro", device="cpu", say=lambda _: None)
    assert stored(tmp_path, "memory")["verdict"].startswith("Partly: finished requests give memory back with move. Of")


def test_cells_that_stood_still_are_named(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "8.json").unlink()
    path = tmp_path / "pieces" / "poisson-gptj-6b-fused.json"
    piece = json.loads(path.read_text())
    cells = [cell["data"] for cell in piece["cells"].values()]
    assert all(0 < median <= longest for median, longest in (data["step_spans"] for data in cells))
    for data, spans in zip(cells, ([0.002, 1.3], [0.2, 0.9], [0.002, 0.09], None)):  # one; the others are slow or old
        data["step_spans"] = spans
    del cells[3]["step_spans"]
    path.write_text(json.dumps(piece))
    paper.run_figures(["8"], tmp_path, "micro", device="cpu", say=lambda _: None)
    note = stored(tmp_path, "8")["notes"][-1]
    first, *others = [f"poisson-gptj-6b-fused, {cell}" for cell in piece["cells"]]
    assert note.startswith("A step stood still, as on a machine that others disturb; do not trust these cells: ")
    assert f"{first} (1.30 s, median 2 ms)" in note
    assert not any(cell in note for cell in others[:3])


# ---- theory ----------------------------------------------------------------------------------------------------------


def test_serial_is_a_queue() -> None:
    assert queue_ends([0, 1, 10], [4, 2, 3]) == [4, 6, 13]


def test_arrivals_bound_the_gain() -> None:
    assert [round(arrival_bound(32, i), 1) for i in (0.089, 0.055, 0.037, 0.046)] == [8.5, 11.8, 14.9, 13.2]
    assert arrival_bound(32, 0) == 32
    assert arrival_bound(4, 2) == 1  # whoever is served before the next arrives has nothing to gain


def test_fusion_without_overhead() -> None:
    """Two of three steps; the second arrives during the first one's second step and joins its third."""
    jobs = [Job(0.0, (1, 2), 3), Job(1.5, (1,), 3)]
    seen: list[tuple[int, int]] = []

    def step(rows: int, tokens: int) -> float:
        seen.append((rows, tokens))
        return 1.0

    result = simulate(jobs, step)
    assert seen == [(1, 2), (1, 3), (2, 5), (1, 2), (1, 3)]
    assert result == (5.0, 5, 6, (3.0 + 3.5) / 2)


def test_a_gap_in_the_arrivals_is_waited_for() -> None:
    assert simulate([Job(0.0, (1,), 1), Job(10.0, (1,), 1)], lambda *_: 1.0).seconds == 11


def test_bytes_of_true_shapes() -> None:
    """Parameters read a step: 5.84e9 of GPT-J (ROOFLINE in the documentation); K and V of a token of 13B: 819,200."""
    shape = ModelConfig.from_dict(SHAPES["llama-13b"])
    size = Bytes.of(SHAPES["llama-13b"], DTYPE_BYTES["bfloat16"], 26_031_739_904)
    assert size.kv_per_token == 819_200
    assert size.weights == 26_031_739_904 - 2 * shape.vocab_size * shape.hidden_size
    assert size.request(8, 3) == sum(size.step(tokens) for tokens in (8, 9, 10))


def test_parameters_of_the_shapes(tmp_path: Path) -> None:
    """13.0, 32.5 and 65.3 billion: 65B has its true intermediate size."""
    bench = Bench(replace(MICRO, shapes=SHAPES, dtype="bfloat16"), 0, tmp_path, tmp_path, device="cpu")
    billions = {}
    for model in SHAPES:
        size = bench.bytes_of(model)
        shape = ModelConfig.from_dict(SHAPES[model])
        billions[model] = round(size.weights / 2e9 + shape.vocab_size * shape.hidden_size / 1e9, 1)
    assert billions == {"gptj-6b": 6.1, "llama-13b": 13.0, "llama-33b": 32.5, "llama-65b": 65.3}


def test_agreement_with_serial() -> None:
    parted = agree([[1, 2, 3], [4, 5]], [[1, 2], [4, 6]])
    assert parted == {"requests": 2, "identical": 1, "first_parting": 1, "logit_gap": None}
    same = agree([[1], [2]], [[1]])
    assert same == {"requests": 1, "identical": 1, "first_parting": None, "logit_gap": None}
    assert total([same, parted | {"logit_gap": 0.5}]) == {
        "requests": 3,
        "identical": 2,
        "first_parting": 1,
        "logit_gap": 0.5,
    }


def test_the_longest_step_of_a_run_is_kept() -> None:
    steps = [StepStats(i, i * 0.01, i * 0.01 + 0.02, num_decode_tokens=1) for i in range(5)]
    steps.append(StepStats(5, 9.0, 9.4, num_decode_tokens=1))  # what was waited for before it is no step
    assert step_spans(Run("x", [], steps)) == pytest.approx([0.02, 0.4])


@pytest.mark.parametrize("count", [1, 300, 301, 599, 900])
def test_a_curve_is_no_longer_than_it_may(count: int) -> None:
    steps = [StepStats(i, i, i + 1.0, num_decode_tokens=1, kv_reserved_bytes=2) for i in range(count)]
    assert min(count, 150) <= len(kv_curve(Run("x", [], steps))["curve"]) <= 300
    run = Run("x", [Record(0.0, 1, [float(i) for i in range(count)])])
    assert len(curves_of(run)["curve_tokens"]) <= 201


def test_step_times_become_a_line() -> None:
    step = seconds_by_rows([{"step_times": [[1, 10, 3.0], [5, 10, 5.0]]}, {"step_times": [[3, 1, 4.0]]}, {}])
    assert step is not None
    assert (step(1), step(9)) == (pytest.approx(3.0), pytest.approx(7.0))
    assert seconds_by_rows([{}]) is None
