"""Laws of arrivals and lengths, jobs of a seed, traces, published workloads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flover.bench.traces import WORKLOADS, named, read_custom, read_trace, trace_jobs
from flover.bench.workload import (
    At,
    Exponential,
    Gamma,
    Interval,
    Lengths,
    Lognormal,
    Normal,
    Percentiles,
    Ramp,
    Uniform,
    Zipf,
    draw_lengths,
    fixed,
    make_jobs,
    poisson,
)

MANY = 20_000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- arrivals --------------------------------------------------------------------------------------------------------


def test_interval() -> None:
    assert Interval(0.5).draw(4, rng()).tolist() == [0, 0.5, 1, 1.5]
    assert not Interval(0).draw(4, rng()).any()


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_gamma_gaps(rate: float, burstiness: float) -> None:
    """Mean 1 / rate, coefficient of variation 1 / sqrt(burstiness), and the third moment of a gamma law."""
    times = Gamma(rate, burstiness).draw(MANY, rng())
    gaps = np.diff(times)
    assert times[0] == 0
    assert (gaps >= 0).all()
    assert gaps.mean() * rate == pytest.approx(1, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    skewness = ((gaps - gaps.mean()) ** 3).mean() / gaps.std() ** 3
    assert skewness == pytest.approx(2 * burstiness**-0.5, rel=0.15)


@pytest.mark.parametrize(
    ("strategy", "rate"), [("linear", lambda share: 1 + 99 * share), ("exponential", lambda share: 100**share)]
)
def test_the_rate_ramps_up(strategy: str, rate: Any) -> None:
    times = np.array([Ramp(1.0, 100.0, strategy, 4.0).draw(1001, rng(seed)) for seed in range(100)])
    assert not times[:, 0].any()
    gaps = np.diff(times, axis=1)
    wanted = np.array([1 / rate(i / 1000) for i in range(1, 1001)])
    assert gaps.reshape(100, 10, 100).mean((0, 2)) == pytest.approx(wanted.reshape(10, 100).mean(1), rel=0.05)
    assert (gaps / wanted).std() == pytest.approx(0.5, rel=0.05)  # 1 / sqrt(burstiness)
    assert Ramp(1.0, 100.0, strategy).draw(1, rng()).tolist() == [0.0]


def test_poisson_is_gamma_of_burstiness_one() -> None:
    assert poisson(3.0).draw(50, rng()).tolist() == Gamma(3.0, 1.0).draw(50, rng()).tolist()
    gaps = np.diff(poisson(2.0).draw(MANY, rng()))
    assert (gaps > 1.0).mean() == pytest.approx(math.exp(-2), rel=0.05), "memoryless"


def test_rescaled_arrivals_take_their_time() -> None:
    for burstiness in (0.1, 1, 9):
        times = Gamma(4.0, burstiness, rescale=True).draw(33, rng(3))
        assert times[-1] == pytest.approx(8.0)
    assert Gamma(4.0, rescale=True).draw(1, rng()).tolist() == [0]


def test_all_at_once() -> None:
    assert not Gamma(math.inf, 0.5, rescale=True).draw(5, rng()).any()


def test_replayed_arrivals_begin_at_zero() -> None:
    assert At([12.5, 10.0, 11.0]).draw(3, rng()).tolist() == [0, 1, 2.5]
    with pytest.raises(ValueError, match="at most 3, replayed, got 4"):
        At([12.5, 10.0, 11.0]).draw(4, rng())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gamma(0.0), "request rate must be over 0"),
        (lambda: Gamma(math.nan), "request rate must be over 0"),
        (lambda: Gamma(1.0, 0.0), "burstiness must be over 0"),
        (lambda: Ramp(0.0, 1.0), "rates of a ramp-up must be over 0 requests/s, got"),
        (lambda: Ramp(1.0, 2.0, "cubic"), "the ramp-up strategy must be linear or exponential, got cubic"),
        (lambda: Interval(-1.0), "interval must be at least 0"),
        (lambda: Uniform(5, 4), "lo <= hi, got"),
        (lambda: fixed(0), "1 <= lo"),
        (lambda: Lognormal.of(100, 90), "no lognormal distribution has mean 100"),
        (lambda: Lognormal.of(100, 400), "must be 1 to 3.87 times the mean"),
        (lambda: Lognormal.of(0, 4), "no lognormal"),
    ],
)
def test_impossible_laws(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_uniform_includes_both_ends() -> None:
    values = Uniform(3, 6).draw(MANY, rng())
    assert set(values.tolist()) == {3, 4, 5, 6}
    assert values.mean() == pytest.approx(4.5, rel=0.02)


@given(mean=st.floats(10, 5000), ratio=st.floats(1.05, 3.8))
@settings(max_examples=30, deadline=None)
def test_lognormal_by_mean_and_p95(mean: float, ratio: float) -> None:
    law = Lognormal.of(mean, ratio * mean)
    assert math.exp(law.mu + law.sigma**2 / 2) == pytest.approx(mean)
    assert math.exp(law.mu + 1.6448536269514722 * law.sigma) == pytest.approx(ratio * mean)
    assert law.sigma <= 1.645, "the smaller root"


def test_drawn_lognormal() -> None:
    values = Lognormal.of(200, 700).draw(4 * MANY, rng())
    assert values.mean() == pytest.approx(200, rel=0.02)
    assert np.percentile(values, 95) == pytest.approx(700, rel=0.03)
    assert Lognormal.of_mean(179, 1.0).draw(4 * MANY, rng()).mean() == pytest.approx(179, rel=0.02)


def test_other_laws() -> None:
    normal = Normal(512, 128, 1, 1024).draw(MANY, rng())
    assert (normal.mean(), normal.std()) == (pytest.approx(512, rel=0.01), pytest.approx(128, rel=0.03))
    assert Normal(512, 128, 500, 600).draw(MANY, rng()).max() == 600
    assert Exponential(256, 10_000).draw(MANY, rng()).mean() == pytest.approx(256, rel=0.02)
    assert Exponential(256, 300).draw(MANY, rng()).max() == 300
    zipf = Zipf(1.1, 4).draw(MANY, rng())
    weights = np.arange(1, 5) ** -1.1
    found = [(zipf == n).mean() for n in range(1, 5)]
    assert found == pytest.approx((weights / weights.sum()).tolist(), abs=0.01)
    points = (1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 999, 1000)
    values = Percentiles(points).draw(MANY, rng())
    assert np.percentile(values, [10, 50, 90]) == pytest.approx([10, 50, 90], rel=0.03)


# ---- jobs ------------------------------------------------------------------------------------------------------------


def jobs(seed: int = 0, rate: float = 5.0, count: int = 40, **changed: Any) -> list[Any]:
    return make_jobs(Gamma(rate), Uniform(2, 30), Uniform(1, 9), count, 100, seed, 64, **changed)


def test_a_seed_decides_the_jobs() -> None:
    assert jobs() == jobs()
    other, faster = jobs(seed=1), jobs(rate=50.0)
    assert [job.prompt for job in other] != [job.prompt for job in jobs()]
    assert [(job.prompt, job.num_output) for job in faster] == [(job.prompt, job.num_output) for job in jobs()]
    assert jobs()[:20] == jobs(count=20), "more requests are the same ones and more"
    assert [job.num_output for job in jobs()] == [m for _, m in draw_lengths(Uniform(2, 30), Uniform(1, 9), 40, 0)]


def test_jobs_are_what_was_asked_for() -> None:
    made = jobs()
    assert len(made) == 40
    assert [job.arrival for job in made] == sorted(job.arrival for job in made)
    assert all(2 <= len(job.prompt) <= 30 and 1 <= job.num_output <= 9 for job in made)
    assert all(0 <= token < 100 and type(token) is int for job in made for token in job.prompt)
    assert len({job.prompt[:8] for job in made}) == 40, "no shared prefix"


def test_what_does_not_fit() -> None:
    def make(shrink: bool) -> list[Any]:
        return make_jobs(Interval(0), fixed(300), fixed(100), 2, 50, 0, 64, shrink)

    with pytest.raises(ValueError, match="a prompt of 300 and an output of 100 tokens do not fit max_model_len=64"):
        make(False)
    assert [(len(job.prompt), job.num_output) for job in make(True)] == [(48, 16)] * 2, "in proportion"
    whole = make_jobs(Interval(0), fixed(300), fixed(100), 2, 50, 0, 400)
    assert [job.prompt for job in make(True)] == [job.prompt[:48] for job in whole]


@given(n=st.integers(1, 10_000), m=st.integers(1, 10_000), limit=st.integers(2, 500))
@settings(max_examples=50, deadline=None)
def test_shrunk_requests_fit(n: int, m: int, limit: int) -> None:
    job = make_jobs(Interval(0), fixed(n), fixed(m), 1, 50, 0, limit, shrink=True)[0]
    assert 1 <= len(job.prompt) <= n
    assert 1 <= job.num_output <= m
    assert len(job.prompt) + job.num_output == min(n + m, limit)


# ---- traces ----------------------------------------------------------------------------------------------------------


def trace(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_trace(tmp_path: Path) -> None:
    path = trace(
        tmp_path,
        {"arrival": 7, "num_prompt": 4, "num_output": 3, "user": "ignored"},
        "",
        {"arrival": 5.5, "prompt_token_ids": [9, 8, 7], "num_output": 2},
    )
    made = trace_jobs(read_trace(path), 100, 0, 64)
    assert [(job.arrival, len(job.prompt), job.num_output) for job in made] == [(0, 3, 2), (1.5, 4, 3)]
    assert made[0].prompt == (9, 8, 7)
    assert made == trace_jobs(read_trace(path), 100, 0, 64)
    assert [job.arrival for job in trace_jobs(read_trace(path), 100, 0, 64, Interval(2.0))] == [0, 2]
    short = trace_jobs(read_trace(path), 100, 0, 4, shrink=True)
    assert [(len(job.prompt), job.num_output) for job in short] == [(2, 2), (2, 2)]
    with pytest.raises(ValueError, match=r"trace\.jsonl:3: token id 9 is not below the vocabulary's 9"):
        trace_jobs(read_trace(path), 9, 0, 64)
    with pytest.raises(ValueError, match=r"trace\.jsonl:3: a prompt of 3 and an output of 2 tokens do not fit"):
        trace_jobs(read_trace(path), 100, 0, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", r"must be a JSON object, got \[1\]"),
        ("[" * 100_000, "trace.jsonl:2: "),
        ({"num_prompt": 1, "num_output": 1}, "arrival must be a number of seconds, got None"),
        ({"arrival": "1", "num_prompt": 1, "num_output": 1}, "arrival must be a number of seconds, got '1'"),
        ('{"arrival": NaN, "num_prompt": 1, "num_output": 1}', "arrival must be a number of seconds, got nan"),
        ({"arrival": 1, "num_prompt": 0, "num_output": 1}, "must be a number of tokens, 1 to 10000000, got 0"),
        ({"arrival": 1, "num_prompt": True, "num_output": 1}, "num_prompt must be a number of tokens"),
        ({"arrival": 1, "num_prompt": 1}, "num_output must be a number of tokens, 1 to 10000000, got None"),
        ({"arrival": 1, "num_prompt": 1, "num_output": 1.5}, "num_output must be .* got 1.5"),
        ({"arrival": 1, "prompt_token_ids": [1, -1], "num_output": 1}, r"list of token ids, got \[1, -1\]"),
        ({"arrival": 1, "prompt_token_ids": [], "num_output": 1}, "list of token ids"),
        ({"arrival": 1, "prompt_token_ids": [1], "num_prompt": 2, "num_output": 1}, "num_prompt is 2, .* leave one"),
    ],
)
def test_bad_trace_lines(tmp_path: Path, line: Any, message: str) -> None:
    path = trace(tmp_path, {"arrival": 0, "num_prompt": 1, "num_output": 1}, line)
    with pytest.raises(ValueError, match=message) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert str(error.value).endswith('a line is {"arrival": 0.5, "num_prompt": 128, "num_output": 32}')


@pytest.mark.parametrize("line", [5, {}, {"prompt": ""}, {"prompt": [1]}, {"prompt": "a", "output_tokens": 0}])
def test_bad_custom_lines(tmp_path: Path, line: Any) -> None:
    with pytest.raises(ValueError, match=r"^[^ ]*:2: .* got .*; a line is .\"prompt\": ") as error:
        read_custom(trace(tmp_path, {"prompt": "a"}, line))
    assert "\n" not in str(error.value)


def test_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no request"):
        read_trace(trace(tmp_path, ""))
    (tmp_path / "trace.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl:1: "):
        read_trace(tmp_path / "trace.jsonl")
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.jsonl")


# ---- published -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [  # means of the source
        ("chat", 512, 256),
        ("sharegpt", 215, 179),
        ("azure-conv", 1155, 211),
        ("azure-code", 2048, 28),
        ("azure-conv-2024", 1632, 106),
        ("azure-code-2024", 2511, 23),
        ("mooncake", 12035, 343),
    ],
)
def test_means_of_published_workloads(name: str, prompt: float, output: float) -> None:
    found = np.mean(draw_lengths(named(name).prompt, named(name).output, 4 * MANY, 0), axis=0)
    assert found.tolist() == pytest.approx([prompt, output], rel=0.08)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_published_workload_makes_jobs(name: str) -> None:
    workload = named(name)
    made = make_jobs(Gamma(4.0, workload.burstiness), workload.prompt, workload.output, 20, 500, 0, 1024, shrink=True)
    assert all(len(job.prompt) + job.num_output <= 1024 for job in made)
    laws: list[Lengths] = [workload.prompt, workload.output]
    for law in laws:
        points = getattr(law, "tokens", (1, 2))
        assert list(points) == sorted(points)


def test_unknown_workload() -> None:
    with pytest.raises(ValueError, match=r"unknown workload 'azure-con'; did you mean 'azure-conv'\?; known: uniform"):
        named("azure-con")
