"""Workloads: when requests arrive, how long they are, and the jobs made of both.

Everything is drawn from a seed, in four independent streams (arrivals, prompt lengths, output lengths, token ids):
the same seed gives the same jobs to every system, and another rate the same lengths and prompts. Prompts are random
ids, so no two share a prefix. numpy only; its streams are stable for one version of numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flover.bench.records import Job

Floats = npt.NDArray[np.float64]
P90, P95 = 1.2815515655446004, 1.6448536269514722  # quantiles of the standard normal distribution
ARRIVALS, PROMPTS, OUTPUTS, TOKENS = range(4)  # the streams of a seed
MOST_TOKENS = 10_000_000  # of a prompt or an output: more is a mistake, and would fill the memory with ids


# ---- arrivals --------------------------------------------------------------------------------------------------------


class Arrivals(Protocol):
    """A law of arrivals."""

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        """Ascending seconds [count], from 0 on."""
        ...


@dataclass(frozen=True, slots=True)
class Interval:
    """One request every `seconds`; 0 is all at once."""

    seconds: float

    def __post_init__(self) -> None:
        check(0 <= self.seconds < math.inf, "the interval", "at least 0 s", self.seconds)

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        return np.arange(count, dtype=np.float64) * self.seconds


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gaps from Gamma(shape=burstiness, scale=1 / (rate * burstiness)), as vLLM's bench defines them.

    Their mean is 1 / rate, their coefficient of variation 1 / sqrt(burstiness): 1 is Poisson, less is burstier.

    Args:
        rate: requests/s; infinite is all at once.
        rescale: stretch the drawn gaps so that their mean is 1 / rate exactly (vLLM's bench does).
    """

    rate: float
    burstiness: float = 1.0
    rescale: bool = False

    def __post_init__(self) -> None:
        check(self.rate > 0, "the request rate", "over 0 requests/s", self.rate)
        check(0 < self.burstiness < math.inf, "burstiness", "over 0 (1 is Poisson)", self.burstiness)

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        times = np.zeros(count)
        if count < 2 or math.isinf(self.rate):
            return times
        gaps = rng.gamma(self.burstiness, 1 / (self.rate * self.burstiness), count - 1)
        if self.rescale and gaps.sum() > 0:
            gaps *= (count - 1) / self.rate / gaps.sum()
        times[1:] = np.cumsum(gaps)
        return times


RAMPS: dict[str, Callable[[float, float, int], Floats]] = {"linear": np.linspace, "exponential": np.geomspace}


@dataclass(frozen=True, slots=True)
class Ramp:
    """Gaps as of `Gamma`, each of its own rate, from `start` to `end` by the number of the request (vLLM's ramp-up)."""

    start: float
    end: float
    strategy: str = "linear"
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        check(self.strategy in RAMPS, "the ramp-up strategy", " or ".join(RAMPS), self.strategy)
        rates = self.start, self.end
        check(all(0 < rate < math.inf for rate in rates), "rates of a ramp-up", "over 0 requests/s", rates)
        check(0 < self.burstiness < math.inf, "burstiness", "over 0 (1 is Poisson)", self.burstiness)

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        rates = RAMPS[self.strategy](self.start, self.end, count)[1:]  # the first request has no gap before it
        return np.cumsum([0.0, *rng.gamma(self.burstiness, 1 / (rates * self.burstiness))])


def poisson(rate: float) -> Gamma:
    """A Poisson process of `rate` requests/s."""
    return Gamma(rate)


@dataclass(frozen=True, slots=True)
class At:
    """Arrivals given in seconds (sorted, the first becomes 0); the first `count` of them."""

    seconds: Sequence[float]

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        check(count <= len(self.seconds), "the number of requests", f"at most {len(self.seconds)}, replayed", count)
        times = np.sort(np.asarray(self.seconds, dtype=np.float64))[:count]
        return times - times[:1]


# ---- lengths ---------------------------------------------------------------------------------------------------------


class Lengths(Protocol):
    """A law of lengths in tokens."""

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        """[count]; rounded and brought to at least 1 by whoever asks."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """Integers in [lo, hi], both included."""

    lo: int
    hi: int

    def __post_init__(self) -> None:
        check(1 <= self.lo <= self.hi, "a range of lengths", "1 <= lo <= hi", (self.lo, self.hi))

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        return rng.integers(self.lo, self.hi + 1, count).astype(np.float64)


def fixed(tokens: int) -> Uniform:
    """Always that many."""
    return Uniform(tokens, tokens)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """exp(N(mu, sigma^2)): median exp(mu), mean exp(mu + sigma^2 / 2)."""

    mu: float
    sigma: float

    @classmethod
    def of(cls, mean: float, p95: float) -> Lognormal:
        """The one with this mean and 95th percentile.

        mean = exp(mu + sigma^2 / 2) and p95 = exp(mu + z sigma) give sigma^2 / 2 - z sigma + ln(p95 / mean) = 0; the
        smaller root is the distribution with the lighter tail.

        Raises:
            ValueError: there is none: p95 is below the mean, or over exp(z^2 / 2) = 3.87 times it.
        """
        log = math.log(p95 / mean) if mean > 0 and p95 > 0 else -1.0
        root = P95 * P95 - 2 * log
        if log < 0 or root < 0:
            raise ValueError(
                f"no lognormal distribution has mean {mean:g} and 95th percentile {p95:g}: the percentile must be"
                f" 1 to {math.exp(P95 * P95 / 2):.2f} times the mean"
            )
        sigma = P95 - math.sqrt(root)
        return cls(math.log(mean) - sigma * sigma / 2, sigma)

    @classmethod
    def of_mean(cls, mean: float, sigma: float) -> Lognormal:
        """The one with this mean and shape."""
        return cls(math.log(mean) - sigma * sigma / 2, sigma)

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        return rng.lognormal(self.mu, self.sigma, count)


@dataclass(frozen=True, slots=True)
class Normal:
    """N(mean, std^2), clipped to [lo, hi]."""

    mean: float
    std: float
    lo: int
    hi: int

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        return np.clip(rng.normal(self.mean, self.std, count), self.lo, self.hi)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Of this mean, clipped to `hi`."""

    mean: float
    hi: int

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        return np.minimum(rng.exponential(self.mean, count), self.hi)


PERCENTS = (0, 1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.9, 100)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """The lengths at PERCENTS of something measured; geometric in between."""

    tokens: tuple[int, ...]

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        return np.exp(np.interp(100 * rng.random(count), PERCENTS, np.log(self.tokens)))


@dataclass(frozen=True, slots=True)
class Zipf:
    """P(n) proportional to n ** -exponent in [1, hi]."""

    exponent: float
    hi: int

    def draw(self, count: int, rng: np.random.Generator) -> Floats:
        weights = np.arange(1, self.hi + 1, dtype=np.float64) ** -self.exponent
        return 1 + np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(count)).astype(np.float64)


# ---- jobs ------------------------------------------------------------------------------------------------------------


def draw_lengths(prompt: Lengths, output: Lengths, count: int, seed: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of `count` requests, as `make_jobs` draws them, before any is shrunk."""
    pairs = (_whole(prompt.draw(count, stream(seed, PROMPTS))), _whole(output.draw(count, stream(seed, OUTPUTS))))
    return list(zip(*pairs))


def make_jobs(
    arrivals: Arrivals,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    count: int,
    vocab_size: int,
    seed: int,
    max_model_len: int,
    shrink: bool = False,
) -> list[Job]:
    """`count` jobs, ascending in arrival.

    Args:
        vocab_size: prompts are drawn uniformly from [0, vocab_size). max_model_len: most prompt + output tokens.
        shrink: shorten a request over `max_model_len`, prompt and output in proportion, instead of refusing it.

    Raises:
        ValueError: an impossible number, or a request that does not fit.
    """
    check(count >= 1, "the number of requests", "at least 1", count)
    check(seed >= 0, "the seed", "at least 0", seed)
    times = arrivals.draw(count, stream(seed, ARRIVALS))
    tokens = stream(seed, TOKENS)
    jobs = []
    for time, (n, m) in zip(times.tolist(), draw_lengths(prompt_lengths, output_lengths, count, seed)):
        kept, m = fit(n, m, max_model_len, shrink)
        ids = tokens.integers(0, vocab_size, n).tolist()  # drawn whole and then cut: the next prompt is the same
        jobs.append(Job(time, tuple(ids[:kept]), m))
    return jobs


def fit(n: int, m: int, limit: int, shrink: bool) -> tuple[int, int]:
    """(prompt, output) tokens that are at most `limit` together; ValueError if they are not and may not shrink."""
    if n + m <= limit:
        return n, m
    if not shrink:
        raise ValueError(
            f"a prompt of {n} and an output of {m} tokens do not fit max_model_len={limit}: ask for shorter ones"
        )
    check(limit >= 2, "max_model_len", "at least 2", limit)
    short = min(max(n * limit // (n + m), 1), limit - 1)
    return short, limit - short


def _whole(lengths: Floats) -> list[int]:
    return [int(n) for n in np.clip(np.rint(lengths), 1, MOST_TOKENS).tolist()]


def stream(seed: int, number: int) -> np.random.Generator:
    """One of the streams of a seed."""
    return np.random.default_rng([seed, number])


def check(good: bool, what: str, rule: str, value: object) -> None:
    """ValueError unless `good`."""
    if not good:
        raise ValueError(f"{what} must be {rule}, got {value}")
