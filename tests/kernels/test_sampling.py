"""The sampler against known answers, a scalar model of vLLM's semantics, and the exact distribution."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from flover.kernels.reference import sampling as ops
from flover.layers.sampler import Sampler
from flover.layers.sampler_state import Field, Needs
from flover.request import RowSampling

CPU = torch.device("cpu")
INF = math.inf


@pytest.fixture(autouse=True)
def _one_thread():
    """The tensors are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def join(sampler, rows, sampling, prompts=None, outputs=None):
    prompts = prompts or [[] for _ in rows]
    outputs = outputs or [[] for _ in rows]
    sampler.join(list(rows), list(sampling), [len(o) for o in outputs], prompts, outputs)


def draw(logits, sampling, prompt=(), output=()):
    """One token for every entry of `sampling`, all with the same logits and history; the ids."""
    n = len(sampling)
    sampler = Sampler(n, logits.shape[-1], CPU)
    join(sampler, range(n), sampling, [list(prompt)] * n, [list(output)] * n)
    return sampler.sample(logits.expand(n, -1), torch.arange(n))


# ---- the scalar model: one row, numpy, float64 unless told, in vLLM v1's order ----


def model_scores(logits, s, prompt=(), output=(), num_outputs=None, dtype=np.float64):
    """Processed logits of one row, before temperature."""
    x = [dtype(v) for v in logits]
    num_outputs = len(output) if num_outputs is None else num_outputs
    for i in range(len(x)):
        if s.allowed_token_ids is not None and i not in s.allowed_token_ids:
            x[i] = dtype(-INF)
        if any(w and w[-1] == i and list(output[max(len(output) - len(w) + 1, 0) :]) == list(w[:-1])
               for w in s.bad_words if len(w) <= len(output) + 1):  # fmt: skip
            x[i] = dtype(-INF)
        if num_outputs < s.min_tokens and i in s.stop_token_ids:
            x[i] = dtype(-INF)
        x[i] = x[i] + dtype(np.float32(dict(s.logit_bias).get(i, 0.0)))
        if i in prompt or i in output:
            r = dtype(s.repetition_penalty)
            x[i] = x[i] / r if x[i] > 0 else x[i] * r
        count = list(output).count(i)
        x[i] = x[i] - dtype(s.frequency_penalty) * dtype(count)
        x[i] = x[i] - dtype(s.presence_penalty) * dtype(count > 0)
    return np.array(x, dtype)


def model_keep(scores, top_k=0, top_p=1.0, min_p=0.0):
    """Which candidates remain: min-p, then top-k, then top-p on what is left, ties kept."""
    p = np.exp(scores - scores.max())
    keep = p >= min_p
    if top_k > 0:
        keep &= scores >= np.sort(scores)[::-1][min(top_k, len(scores)) - 1]
    if top_p < 1:
        total, mass = p[keep].sum(), 0.0
        for v in sorted(scores[keep], reverse=True):
            mass += np.exp(v - scores.max())
            if mass >= top_p * total:
                break
        keep &= scores >= v
    return keep


def model_probs(logits, s, prompt=(), output=()):
    x = model_scores(logits, s, prompt, output) / s.temperature
    p = np.where(model_keep(x, s.top_k, s.top_p, s.min_p), np.exp(x - x.max()), 0.0)
    return p / p.sum()


def model_philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


# ---- randomness ----


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, expected):
    """Random123's kat_vectors, philox4x32-10."""
    assert model_philox(counter, key) == expected
    words = ops.philox4x32(*(torch.tensor([v]) for v in (*counter, *key)))
    assert [int(w) for w in words] == expected
    square = [torch.full((3, 5), v) for v in (*counter, *key)]
    assert all((w == e).all() for w, e in zip(ops.philox4x32(*square), expected, strict=True))


def test_gumbel_is_keyed_as_documented():
    rng = random.Random(0)
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1] + [rng.getrandbits(64) for _ in range(6)]
    choices, positions = list(range(12)), [rng.randrange(100_000) for _ in seeds]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds])
    noise = ops.gumbel(23, signed, torch.tensor(choices), torch.tensor(positions), purpose=7)
    assert noise.shape == (12, 23)
    assert noise.dtype == torch.float32
    for row, (seed, choice, position) in enumerate(zip(seeds, choices, positions, strict=True)):
        for token in range(23):
            bits = model_philox((token // 4, position, 7, seed >> 32), (seed % 2**32, choice))[token % 4]
            u = ((bits >> 8) + 0.5) * 2.0**-24
            assert math.isclose(noise[row, token], -math.log(-math.log(u)), rel_tol=2e-7)


def test_the_sampler_draws_with_its_seed_choice_and_position():
    seeds, choices = [5, 2**63 + 5, 2**64 - 1, 5], [0, 0, 2, 2**31]
    sampler = Sampler(4, 500, CPU)
    sampling = [RowSampling(seed=s, choice=c) for s, c in zip(seeds, choices, strict=True)]
    sampler.join(list(range(4)), sampling, [3, 0, 9, 3], [[]] * 4, [[]] * 4)
    for step in range(3):
        tokens = sampler.sample(torch.zeros(4, 500), torch.arange(4)).token_ids.tolist()
        for token, seed, choice, start in zip(tokens, seeds, choices, [3, 0, 9, 3], strict=True):
            bits = [
                model_philox((i // 4, start + step, 0, seed >> 32), (seed % 2**32, choice))[i % 4] >> 8
                for i in range(500)
            ]
            assert token == bits.index(max(bits))


def test_gumbel_is_finite_and_monotone_for_every_m():
    noise = ops.gumbel_from_bits(torch.arange(2**24, dtype=torch.float64))
    assert noise.isfinite().all()
    assert (noise.diff() >= 0).all()
    m = torch.arange(0, 2**24, 101)
    high = -torch.log1p(-((2**24 - 1 - m).float() + 0.5) * 2.0**-24)  # the recipe for fp32 kernels
    fp32 = -torch.where(m < 2**23, -torch.log((m.float() + 0.5) * 2.0**-24), high).log()
    torch.testing.assert_close(fp32, noise[m], rtol=1e-6, atol=2e-7)


# ---- distributions ----

LOGITS = torch.tensor(np.random.default_rng(5).normal(0, 1.5, 37), dtype=torch.float32)
HISTORY = {"prompt": (3, 3, 9, 20), "output": (5, 7, 5, 5, 11)}
DISTRIBUTIONS = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "filters": {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.7, "frequency_penalty": 0.4, "presence_penalty": -0.7},
    "logit_bias": {"logit_bias": ((0, 3.0), (5, -2.0), (36, 100.0), (7, 99.0))},
    "bad_words": {"bad_words": ((2,), (5, 11, 4), (11, 8), (5, 6), (4, 11, 30))},
    "allowed": {"allowed_token_ids": (1, 2, 3, 30, 36)},
    "allowed+bias": {"allowed_token_ids": (1, 2, 3), "logit_bias": ((1, 2.0), (4, 50.0))},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": (0, 12, 13)},
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_follow_the_exact_distribution(name):
    n = 12_000
    rng = random.Random(name)
    sampling = [RowSampling(seed=rng.getrandbits(64), choice=i % 3, **DISTRIBUTIONS[name]) for i in range(n)]
    out = draw(LOGITS, sampling, **HISTORY)
    probs = model_probs(LOGITS.numpy(), sampling[0], **HISTORY)
    assert out.finite.all()
    counts = np.bincount(out.token_ids.numpy(), minlength=37)
    assert (counts[probs == 0] == 0).all()  # nothing outside the support
    assert (counts[probs > 12 / n] > 0).all()  # all of it is reached
    often = probs * n >= 5
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(probs[often], probs[~often].sum()) * n
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-4


def test_positions_choices_and_seeds_are_independent_streams():
    """One row over many positions is as random as many rows; pairs along each axis are uncorrelated."""
    n, logits = 16, torch.zeros(600, 4)
    sampler = Sampler(600, 4, CPU)
    join(sampler, range(600), [RowSampling(seed=1 + i // 30, choice=i % 30) for i in range(600)])
    tokens = torch.stack([sampler.sample(logits, torch.arange(600)).token_ids for _ in range(n)])  # [n, 600]
    for a, b in [
        (tokens[1:], tokens[:-1]),
        (tokens[:, 1:], tokens[:, :-1]),
        (tokens[:, 30:], tokens[:, :-30]),
    ]:
        pairs = np.bincount((a * 4 + b).flatten().numpy(), minlength=16)
        assert stats.chisquare(pairs).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters_keep_exactly_the_right_set(dtype):
    rng = np.random.default_rng(0)
    n, vocab = 400, 61
    x = rng.normal(0, 2, (n, vocab))
    x[: n // 2] = np.round(x[: n // 2] * 2) / 2  # full of ties
    x[::7, ::3] = -INF
    scores = torch.tensor(x, dtype=dtype)
    top_k = rng.choice([0, 1, 2, 5, 40, 60], n)
    top_p = rng.choice([1.0, 0.05, 0.5, 0.9, 0.999], n)
    min_p = rng.choice([0.0, 0.02, 0.3, 1.0], n)
    for k, p, m in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0, 1, 1)]:
        got = ops.filter_logits(
            scores.clone(),
            torch.tensor(top_k) if k else None,
            torch.tensor(top_p) if p else None,
            torch.tensor(min_p) if m else None,
            60 if k else 0,
        )
        for row in range(n):
            args = (int(top_k[row]) * k, top_p[row] if p else 1.0, min_p[row] * m)
            expected = model_keep(scores[row].double().numpy(), *args) & np.isfinite(x[row])
            assert (got[row].isfinite().numpy() == expected).all(), args
            assert (got[row][expected] == scores[row][expected]).all()


def test_top_p_stops_where_the_mass_is_exactly_reached():
    x = torch.tensor([[-math.log(2), 0.0, -math.log(2)]], dtype=torch.float64)  # 1/4, 1/2, 1/4
    for p, kept in [(0.5, [1]), (0.5 + 1e-9, [0, 1, 2])]:
        y = ops.filter_logits(x.clone(), top_p=torch.tensor([p], dtype=torch.float64))
        assert y.isfinite().nonzero()[:, 1].tolist() == kept


def test_ties_at_a_threshold_are_kept_whole():
    x = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0, 2.0, 3.0]])
    for k, kept in [(1, [1, 7]), (2, [1, 7]), (3, [1, 2, 3, 4, 6, 7])]:
        y = ops.filter_logits(x.clone(), top_k=torch.tensor([k]), max_top_k=k)
        assert y.isfinite().nonzero()[:, 1].tolist() == kept
    for p, kept in [(0.1, [1, 7]), (0.7, [1, 2, 3, 4, 6, 7]), (0.9, [1, 2, 3, 4, 6, 7])]:
        y = ops.filter_logits(x.clone(), top_p=torch.tensor([p], dtype=torch.float64))
        assert y.isfinite().nonzero()[:, 1].tolist() == kept
    # top-k leaves more than k by a tie; top-p's renormalised set reaches into that tie
    both = ops.filter_logits(
        x.clone(), torch.tensor([3]), torch.tensor([0.95], dtype=torch.float64), None, 3, open_top_p=False
    )
    assert both.isfinite().nonzero()[:, 1].tolist() == [1, 2, 3, 4, 6, 7]


def test_top_p_larger_than_the_sorted_prefix():
    x = torch.randn(3, 3000, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.1], [4.0], [0.1]])
    x[2, 5] = -80.0  # too improbable to have any mass, but top-p 1 keeps all
    top_p = torch.tensor([0.9, 0.9, 1.0], dtype=torch.float64)
    got = ops.filter_logits(x.clone(), top_p=top_p).isfinite()
    assert got[0].sum() > ops.SORTED_PREFIX > got[1].sum()
    for row in range(3):
        assert (got[row].numpy() == model_keep(x[row].double().numpy(), top_p=float(top_p[row]))).all()


# ---- the batch does not matter ----

VOCAB = 1039  # odd, and larger than the sorted prefix


def mixed_sampling(rng, i):
    """A row with a few random features."""
    maybe = lambda p, value, default: value if rng.random() < p else default  # noqa: E731
    ids = lambda n: tuple(rng.sample(range(VOCAB), n))  # noqa: E731
    return RowSampling(
        seed=rng.getrandbits(64),
        choice=i % 4,
        temperature=rng.choice([0.0, 0.0, 1e-6, 0.3, 1.0, 2.5]),
        top_k=maybe(0.4, rng.choice([1, 7, 50, 2000]), 0),
        top_p=maybe(0.4, rng.choice([0.3, 0.95, 0.9999]), 1.0),
        min_p=maybe(0.2, 0.02, 0.0),
        repetition_penalty=maybe(0.3, rng.choice([0.7, 1.4]), 1.0),
        presence_penalty=maybe(0.3, rng.choice([-0.5, 1.5]), 0.0),
        frequency_penalty=maybe(0.3, rng.choice([-0.3, 0.8]), 0.0),
        logit_bias=maybe(0.2, tuple((t, rng.uniform(-5, 5)) for t in ids(20)), ()),
        bad_words=maybe(0.3, tuple(ids(rng.randint(1, 4)) for _ in range(rng.randint(1, 5))), ()),
        allowed_token_ids=maybe(0.2, ids(60), None),
        min_tokens=maybe(0.3, rng.randint(1, 5), 0),
        stop_token_ids=ids(rng.randint(0, 3)),
        logprobs=maybe(0.3, rng.choice([0, 1, 5]), -1),
    )


def alone(s, logits, prompt, output):
    """Tokens and logprobs of one row by itself, one step per entry of `logits`."""
    sampler = Sampler(1, VOCAB, CPU)
    join(sampler, [0], [s], [prompt], [output])
    return [sampler.sample(step[None], torch.tensor([0])) for step in logits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_do_not_depend_on_the_batch(dtype):
    """64 rows in any order, relocated every step with vacancies between, give the bits they give alone."""
    rng, steps, n = random.Random(3), 5, 64
    sampling = [mixed_sampling(rng, i) for i in range(n)]
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(steps, n, VOCAB, generator=generator) * 2).to(dtype)
    logits[:, ::9] *= 0.05  # flat: large top-p sets
    prompts = [[rng.randrange(VOCAB) for _ in range(9)] for _ in range(n)]
    outputs = [[rng.randrange(VOCAB) for _ in range(i % 4)] for i in range(n)]
    expected = [alone(sampling[i], logits[:, i], prompts[i], outputs[i]) for i in range(n)]
    sampler = Sampler(2 * n, VOCAB, CPU)
    place = rng.sample(range(2 * n), n)
    for i in range(0, n, 16):  # joins in several parts, so that tables grow
        part = slice(i, i + 16)
        join(sampler, place[part], sampling[part], prompts[part], outputs[part])
    for step in range(steps):
        order = rng.sample(range(n), n)
        before = logits[step].clone()
        out = sampler.sample(logits[step, order], torch.tensor([place[i] for i in order]))
        assert torch.equal(logits[step], before)
        assert torch.equal(sampler.last_token[[place[i] for i in order]], out.token_ids)
        for at, i in enumerate(order):
            want = expected[i][step]
            assert want.token_ids.item() == out.token_ids[at].item(), (i, sampling[i])
            assert out.finite[at]
            if want.logprobs is not None:
                k = sampling[i].logprobs
                for w, g in zip(want.logprobs, out.logprobs, strict=True):
                    assert torch.equal(w[0], g[at, :k] if w.dim() == 2 else g[at])
        new = rng.sample(range(2 * n), n)  # swaps, cycles and moves into vacancies at once
        sampler.relocate(list(zip(place, new, strict=True)))
        place = new


def test_preempted_rows_continue_as_if_they_had_never_left():
    rng, n, steps = random.Random(11), 24, 8
    sampling = [mixed_sampling(rng, i) for i in range(n)]
    logits = torch.randn(steps, n, VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    prompts = [[rng.randrange(VOCAB) for _ in range(5)] for _ in range(n)]
    steady, broken = Sampler(n, VOCAB, CPU), Sampler(n, VOCAB, CPU)
    for sampler in (steady, broken):
        join(sampler, range(n), sampling, prompts)
    rows, outputs = torch.arange(n), [[] for _ in range(n)]
    for step in range(steps):
        if step in (3, 5):  # back into rows that others used
            broken.leave(list(range(n)))
            back = [(7 * i + step) % n for i in range(n)]
            known = [s.needs_history for s in sampling]
            broken.join(
                back,
                sampling,
                [step] * n,
                [p if k else [] for p, k in zip(prompts, known, strict=True)],
                [o if k else [] for o, k in zip(outputs, known, strict=True)],
            )
            broken.relocate(list(zip(back, range(n), strict=True)))
        a, b = steady.sample(logits[step], rows), broken.sample(logits[step], rows)
        assert torch.equal(a.token_ids, b.token_ids)
        assert torch.equal(steady._state, broken._state)
        for o, token in zip(outputs, a.token_ids.tolist(), strict=True):
            o.append(token)
    counted = torch.tensor([n.penalties for n in map(steady._row_needs.get, range(n))])
    history = steady._tables.history.data
    assert torch.equal(history, broken._tables.history.data)
    assert (history[~counted] == 0).all()
    assert ((history[counted] >> 1).sum(-1) == steps).all()


def test_needs_are_exact_and_vacated_rows_leak_nothing():
    rng, rows = random.Random(4), 12
    sampler, live = Sampler(rows, VOCAB, CPU), {}
    plain = RowSampling(seed=1, temperature=0.0)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    for step in range(300):
        free = [r for r in range(rows) if r not in live]
        op = rng.choice(["join", "leave", "move"])
        if op == "join" and free:
            chosen = rng.sample(free, rng.randint(1, min(3, len(free))))
            new = {r: rng.choice([plain, mixed_sampling(rng, step)]) for r in chosen}
            join(sampler, chosen, new.values(), [[1, 2]] * len(new), [[3]] * len(new))
            live.update(new)
        elif op == "leave" and live:
            gone = rng.sample(sorted(live), rng.randint(1, len(live)))
            sampler.leave(gone)
            live = {r: s for r, s in live.items() if r not in gone}
        elif op == "move" and live:
            src = rng.sample(sorted(live), rng.randint(1, len(live)))
            dst = rng.sample(range(rows), len(src))  # what lives there and does not move is overwritten
            moves = list(zip(src, dst, strict=True))
            sampler.relocate(moves)
            kept = {r: s for r, s in live.items() if r not in src and r not in dst}
            live = kept | {d: live[s] for s, d in moves}
        needs = {r: Needs.of(s, VOCAB) for r, s in live.items()}
        assert sampler._row_needs == needs
        assert sampler._live == Counter(needs.values())
        assert sampler.needs == Needs.merge(needs.values())
        for r in [r for r, s in live.items() if s is plain]:
            assert sampler.sample(logits, torch.tensor([r])).token_ids == logits.argmax()


# ---- greedy, penalties, masks ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_greedy_is_argmax_and_ties_go_to_the_lowest_id(dtype):
    logits = torch.randn(50, 501, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, 77] = logits[:, 400] = logits.amax(-1) + 1
    logits[10:, 77] = 0
    for extra in ([], [RowSampling(seed=1)]):  # greedy alone, and beside a random row
        sampler = Sampler(51, 501, CPU)
        filters = {"top_k": 3, "top_p": 0.5, "min_p": 0.9}
        greedy = [RowSampling(seed=i, temperature=[0.0, 9e-6][i % 2], **filters) for i in range(50)]
        join(sampler, range(50 + len(extra)), greedy + extra)
        assert sampler.needs == Needs(random=bool(extra))
        out = sampler.sample(logits, torch.arange(50))
        assert out.token_ids.tolist() == [77] * 10 + [400] * 40
        assert out.logprobs is None
        assert sampler._state[Field.NUM_OUTPUTS].tolist() == [1] * 50 + [0]


def test_fp64_decides_by_what_fp32_cannot_see():
    logits = torch.zeros(1, 9, dtype=torch.float64)
    logits[0, 4], logits[0, 6] = 1.0, 1.0 + 1e-12
    for s in (
        RowSampling(seed=0, temperature=0.0),
        RowSampling(seed=0, top_k=1),
        RowSampling(seed=0, temperature=1e-4, min_p=1.0),
        RowSampling(seed=0, temperature=0.0, repetition_penalty=1.5, logit_bias=((4, 1.0), (6, 1.0))),
    ):
        assert draw(logits, [s] * 20, prompt=[1]).token_ids.eq(6).all()


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("features", [False, True])
def test_a_broken_row_is_reported_and_touches_no_other(bad, temperature, features):
    n, logits = 12, torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(0))
    rng = random.Random(1)
    extra = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "bad_words": ((17,),), "frequency_penalty": 0.1,
             "logit_bias": ((17, -1.0),), "min_tokens": 9, "stop_token_ids": (17,), "logprobs": 2}  # fmt: skip
    sampling = [
        RowSampling(seed=rng.getrandbits(60), temperature=temperature, **(extra if features else {})) for _ in range(n)
    ]
    expected = torch.cat([draw(logits[i : i + 1], [sampling[i]]).token_ids for i in range(n)])
    broken = logits.clone()
    broken[[2, 7], 17] = bad  # masked as well
    broken[11] = bad
    fine = torch.ones(n, dtype=torch.bool)
    fine[[11] if bad == -INF else [2, 7, 11]] = False
    sampler = Sampler(n, VOCAB, CPU)
    join(sampler, range(n), sampling)
    out = sampler.sample(broken, torch.arange(n))
    assert torch.equal(out.finite, fine)
    same = torch.arange(n) if bad == -INF else fine.nonzero()[:, 0]
    same = same[fine[same] & ~torch.isin(same, torch.tensor([2, 7]))]
    assert torch.equal(out.token_ids[same], expected[same])
    assert (out.token_ids[~fine] == 0).all()


def test_nothing_left_to_choose_is_not_finite():
    masked = RowSampling(seed=0, allowed_token_ids=(3,), bad_words=((3,),))
    logits = torch.zeros(2, 8)
    sampler = Sampler(2, 8, CPU)
    join(sampler, [0, 1], [masked, RowSampling(seed=0, allowed_token_ids=(3,))])
    out = sampler.sample(logits, torch.tensor([0, 1]))
    assert out.finite.tolist() == [False, True]
    assert out.token_ids.tolist() == [0, 3]


def test_processed_logits_equal_the_scalar_model():
    """Masks, biases and penalties of random rows over several steps, in fp32, to the last bit."""
    rng, n, vocab = random.Random(8), 40, 31
    ids = lambda k: tuple(rng.sample(range(vocab), k))  # noqa: E731
    sampling = [
        RowSampling(
            seed=i,
            temperature=rng.choice([0.0, 1.0]),
            repetition_penalty=rng.choice([1.0, 0.5, 1.3]),
            presence_penalty=rng.choice([0.0, 0.7, -1.1]),
            frequency_penalty=rng.choice([0.0, 0.3, -0.2]),
            logit_bias=tuple((t, rng.uniform(-3, 3)) for t in ids(rng.choice([0, 4]))),
            bad_words=tuple(ids(rng.randint(1, 2)) for _ in range(rng.choice([0, 25]))),
            allowed_token_ids=rng.choice([None, ids(20)]),
            min_tokens=rng.choice([0, 2, 6]),
            stop_token_ids=ids(3),
        )
        for i in range(n)
    ]
    prompts = [[rng.randrange(vocab) for _ in range(6)] for _ in range(n)]
    outputs = [[rng.randrange(vocab) for _ in range(i % 5)] for i in range(n)]
    sampler, rows = Sampler(n, vocab, CPU), torch.arange(n)
    join(sampler, rows.tolist(), sampling, prompts, outputs)
    for step in range(6):
        logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(step)) * 3
        got = sampler._process(logits, rows, sampler._state, sampler.needs)
        for i, s in enumerate(sampling):
            want = model_scores(logits[i].numpy(), s, prompts[i], outputs[i], dtype=np.float32)
            np.testing.assert_array_equal(got[i].numpy(), want)
        out = sampler.sample(logits, rows)
        for i, token in enumerate(out.token_ids.tolist()):
            outputs[i].append(token)


def test_min_tokens_masks_until_that_many_exist():
    s = RowSampling(seed=0, temperature=0.0, min_tokens=3, stop_token_ids=(4, 6))
    logits = torch.zeros(1, 9)
    logits[0, 4], logits[0, 6], logits[0, 1] = 9.0, 8.0, 1.0
    sampler = Sampler(1, 9, CPU)
    join(sampler, [0], [s])
    assert [sampler.sample(logits, torch.tensor([0])).token_ids.item() for _ in range(5)] == [1, 1, 1, 4, 4]


def test_bad_words_look_back_over_generated_ids():
    """The best ids are 1 to 6 in turn, and 0 is second; a word is broken at its last id, and at no other."""
    words = [((2, 3),), ((1, 2, 3, 4),), ((2, 3), (4, 5, 6)), ((7,), (9, 3)), ((0, 3, 4, 5, 6), (6, 0))]
    expected = [[1, 2, 0, 4, 5, 6], [1, 2, 3, 0, 5, 6], [1, 2, 0, 4, 5, 0], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]
    words.append(((8, 8, 8, 8), (1, 2, 1)))  # joins with fewer outputs than the longest word looks back on
    expected.append([0, 2, 3, 4, 5, 6])
    sampler, got = Sampler(6, 10, CPU), []
    for row, w in enumerate(words):  # one by one, so that the tables grow
        join(
            sampler, [row], [RowSampling(seed=0, temperature=0.0, bad_words=w)], [[2, 2]], [[1, 2] if row == 5 else []]
        )
    for best in range(1, 7):
        logits = torch.zeros(6, 10)
        logits[:, best], logits[:, 0] = 2.0, 1.0
        got.append(sampler.sample(logits, torch.arange(6)).token_ids)
    assert torch.stack(got, 1).tolist() == expected


# ---- logprobs, validation ----


def test_logprobs_are_of_the_raw_logits_with_ties_by_id():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1] = logits[1].round()
    wanted = [RowSampling(seed=9, logprobs=k, logit_bias=((8, 100.0),)) for k in (0, 4, 60)]
    sampler = Sampler(3, 50, CPU)
    join(sampler, range(3), wanted)
    out = sampler.sample(logits, torch.arange(3))
    assert out.token_ids.tolist() == [8, 8, 8]
    chosen, rank, ids, top = out.logprobs
    assert ids.shape == top.shape == (3, 50)
    raw = logits.log_softmax(-1)
    torch.testing.assert_close(chosen, raw[:, 8])
    for i in range(3):
        order = sorted(range(50), key=lambda t, i=i: (-float(logits[i, t]), t))
        assert ids[i].tolist() == order
        torch.testing.assert_close(top[i], raw[i, order])
        assert rank[i] == 1 + sum(float(v) > float(logits[i, 8]) for v in logits[i])
    sampler.leave([1, 2])
    chosen, rank, ids, top = sampler.sample(logits[:1], torch.tensor([0])).logprobs
    assert ids.shape == (1, 0)
    assert sampler.sample(logits[:0], torch.tensor([], dtype=torch.int64)).token_ids.shape == (0,)


@pytest.mark.parametrize(
    "bad",
    [
        {"logit_bias": ((9, 1.0),)},
        {"bad_words": ((1, 9),)},
        {"allowed_token_ids": (-1,)},
        {"stop_token_ids": (9,), "min_tokens": 1},
    ],
)
def test_an_id_outside_the_vocabulary_is_refused_before_anything_changes(bad):
    sampler = Sampler(2, 9, CPU)
    join(sampler, [0], [RowSampling(seed=5)])
    state = sampler._state.clone()
    with pytest.raises(ValueError, match=f"{next(iter(bad))} holds token id"):
        join(sampler, [0, 1], [RowSampling(seed=1), RowSampling(seed=1, **bad)])
    assert torch.equal(state, sampler._state)
    assert list(sampler._row_needs) == [0]
    with pytest.raises(ValueError, match="prompt holds token id 12"):
        join(sampler, [1], [RowSampling(seed=1, presence_penalty=1.0)], [[3, 12]], [[]])
