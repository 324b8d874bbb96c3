"""The GPU's sampling against its twin: the same bits, the same candidates, the same tokens."""

import math

import pytest
import torch
import triton
import triton.language as tl

from flover.kernels.reference import sampling as twin
from flover.kernels.triton import noise, threshold
from flover.kernels.triton import sampling as ops

INF, NAN = math.inf, math.nan
FILTERS = ("top_k", "top_p", "min_p")
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")  # the interpreter's
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch, device):
    """The interpreter pays for every lane and operation; and so a small vocabulary has several tiles and rounds too."""
    if device.type == "cpu":
        monkeypatch.setattr(ops, "TILE", 256)
        monkeypatch.setattr(ops, "BLOCK", 128)
        monkeypatch.setattr(threshold, "PIVOTS", tl.constexpr(32))


def make_scores(rows, vocab, device, seed=0, kind="mixed"):
    """`model`: a few ids stand out; `flat`: all are candidates; `ties`: few distinct values; `masked`: many -inf."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocab, generator=g) * 2.5
    kinds = ("model", "flat", "ties", "masked")
    for row in range(rows):
        k = kinds[row % 4] if kind == "mixed" else kind
        if k == "model":
            x[row, torch.randint(vocab, (3,), generator=g)] += 10
        elif k == "flat":
            x[row] *= 0.02
        elif k == "ties":
            x[row] = (x[row] * 2).round() / 2
        elif k == "masked":
            x[row, torch.rand(vocab, generator=g) < 0.9] = -INF
            x[row, 1] = 0.0
    return x.to(device)


def make_params(rows, vocab, device, filters=(), seed=0, greedy=0.2):
    """Per-row parameters as the sampler passes them: rows of a packed state; neutral filters among them."""
    g = torch.Generator().manual_seed(seed + 1)

    def pick(values, dtype):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=g)]

    ints = torch.stack(
        [
            torch.randint(-(2**63), 2**63 - 1, (rows,), generator=g),
            torch.randint(5, (rows,), generator=g),
            torch.randint(100_000, (rows,), generator=g),
            pick([0, 1, 2, 5, 40, max(vocab // 2, 1), vocab, vocab + 7], torch.int64),
        ]
    ).to(device)
    is_random = torch.rand(rows, generator=g) >= greedy
    floats = torch.stack(
        [
            pick([0.3, 0.7, 1.0, 1.3, 5.0], torch.float64).where(is_random, 1.0),
            is_random.double(),
            pick([1.0, 0.0, 1e-9, 0.3, 0.5, 0.9, 0.95, 0.9999, 1 - 1e-12], torch.float64),
            pick([0.0, 1e-30, 1e-4, 0.02, 0.3, 1.0], torch.float64),
        ]
    ).to(device)
    given = {"top_k": ints[3], "top_p": floats[2], "min_p": floats[3]}
    params = {"temperature": floats[0], "random": floats[1], "seeds": ints[0], "choices": ints[1], "positions": ints[2]}
    return params | {name: given[name] if name in filters else None for name in FILTERS}


def twin_draw(scores, params):
    return twin.draw(scores, **params, max_top_k=0 if params["top_k"] is None else scores.shape[1])


def select(params, rows):
    return {name: p if p is None else p[rows] for name, p in params.items()}


def check(scores, params, close_allowed=1):
    """Equal to the twin, but for a few rows whose two best noisy scores, or whose top-p set, are too close to call."""
    tokens, finite = ops.draw(scores, **params)
    expected, expected_finite = twin_draw(scores, params)
    assert tokens.dtype == torch.int64
    assert torch.equal(finite, expected_finite)
    other = (tokens != expected).nonzero()[:, 0]
    assert len(other) <= close_allowed, other
    if not len(other):
        return tokens
    few = select(params, other)
    alternatives = [expected[other]]
    if params["top_p"] is not None:
        for slack in (1 - 1e-6, 1 + 1e-6):
            top_p = (few["top_p"] * slack).where(few["top_p"] < 1, few["top_p"])
            alternatives.append(twin_draw(scores[other], {**few, "top_p": top_p})[0])
    noise = twin.gumbel(scores.shape[1], few["seeds"], few["choices"], few["positions"])
    noisy = scores[other].float() / few["temperature"][:, None].float() + noise
    gap = (
        torch.stack([noisy.gather(1, t[:, None])[:, 0] for t in alternatives]) - noisy.gather(1, tokens[other, None]).T
    )
    same = torch.stack([t == tokens[other] for t in alternatives])
    assert (same | (gap.abs() < 1e-5)).any(0).all(), (tokens[other], alternatives, gap)
    return tokens


# ---- randomness ----


@triton.jit
def _write_words(out, seeds, choices, positions, purpose, groups, N: tl.constexpr):
    row, group = tl.program_id(0), tl.arange(0, N)
    words = noise._philox(group, tl.load(seeds + row), tl.load(choices + row), tl.load(positions + row), purpose)
    for lane in tl.static_range(4):
        tl.store(out + (row * groups + group) * 4 + lane, words[lane].to(tl.int64), mask=group < groups)


@triton.jit
def _write_gumbel(out, m, n, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    word = (tl.load(m + at, mask=at < n, other=0).to(tl.uint32) << 8) + 0xFF  # the low bits are not looked at
    tl.store(out + at, noise._gumbel_of(word), mask=at < n)


def test_random_words_equal_the_twins_bit_for_bit(device):
    seeds = torch.tensor([0, 1, 2**32 - 1, 2**32, -1, -(2**63), 2**63 - 1, -123456789], device=device)
    choices = torch.tensor([0, 1, 2, 3, 2**31, 2**32 - 1, 7, 0], device=device)
    positions = torch.tensor([0, 5, 2**31, 2**32 - 1, 77, 1, 0, 100_000], device=device)
    out = torch.empty(8, 25, 4, dtype=torch.int64, device=device)
    _write_words[(8,)](out, seeds, choices, positions, 3, 25, N=32)
    expected = twin.philox4x32(
        torch.arange(25, device=device)[None],
        positions[:, None],
        torch.full_like(positions, 3)[:, None],
        (seeds >> 32)[:, None] & twin.MASK32,
        seeds[:, None] & twin.MASK32,
        choices[:, None],
    )
    assert torch.equal(out, torch.stack(expected, -1))


def test_gumbel_is_accurate_for_all_m(device):
    ends = torch.cat([torch.arange(3000), 2**23 + torch.arange(-3000, 3000), 2**24 - 3000 + torch.arange(3000)])
    m = torch.cat([ends, torch.arange(0, 2**24, 1 if device.type == "cuda" else 101)]).unique().to(device)
    out = torch.empty(len(m), device=device)
    _write_gumbel[(triton.cdiv(len(m), 8192),)](out, m, len(m), N=8192)
    expected = twin.gumbel_from_bits(m.double())
    torch.testing.assert_close(out, expected, rtol=5e-7, atol=3e-7)
    assert (out.diff() > -1e-6).all()


@pytest.mark.parametrize("vocab", [1, 97, 5003])
def test_noise_is_the_twins(device, vocab):
    p = make_params(3, vocab, device)
    args = (vocab, p["seeds"], p["choices"], p["positions"])
    for purpose in (0, 1, 9):
        torch.testing.assert_close(ops.gumbel(*args, purpose), twin.gumbel(*args, purpose), rtol=5e-7, atol=3e-7)


# ---- draws ----


@triton.jit
def _run_search(keys, n, low, high, targets, out, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    low, high = tl.load(low), tl.load(high)
    tl.store(out + i, threshold._search(keys, n, low, high, tl.load(targets + i), 0.0, False, BLOCK))


@pytest.mark.parametrize(("low", "high"), [(-20, 19), (-3, 12), (5, 5)])
def test_search_is_exact_to_the_last_key(device, monkeypatch, low, high):
    monkeypatch.setattr(threshold, "PIVOTS", tl.constexpr(4))
    keys = torch.randint(-20, 20, (200,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    targets = torch.tensor([0, 1, 2, 20, 77, 150, 199, 200, 201]).double()
    ends = [torch.tensor([end], device=device) for end in (low, high)]
    out = torch.empty(len(targets), dtype=torch.int64, device=device)
    _run_search[(len(targets),)](keys.to(device), 200, *ends, targets.to(device), out, BLOCK=64)
    expected = [
        max([t for t in range(low, high + 1) if (keys >= t).sum() >= target], default=low) for target in targets
    ]
    assert out.tolist() == expected


SETS = [(), ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p"), ("top_p", "min_p"), FILTERS]


@pytest.mark.parametrize("filters", SETS, ids="+".join)
@pytest.mark.parametrize(("rows", "vocab"), [(8, 97), (4, 5003)])
def test_tokens_equal_the_twins(device, rows, vocab, filters):
    scores = make_scores(rows, vocab, device, seed=vocab)
    before = scores.clone()
    check(scores, make_params(rows, vocab, device, filters, seed=vocab), close_allowed=0)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("filters", [(), FILTERS], ids="+".join)
def test_other_dtypes_and_strided_rows(device, dtype, filters):
    scores = torch.empty(4, 1200, dtype=dtype, device=device)[:, 100:1100]
    scores.copy_(make_scores(4, 1000, device))
    params = make_params(4, 1000, device, filters)
    check(scores, params, close_allowed=0)
    if dtype == torch.float32:
        single = {n: p.float() if p is not None and p.dtype == torch.float64 else p for n, p in params.items()}
        check(scores, single, close_allowed=0)


def test_greedy_takes_the_lowest_of_the_best(device, dtype):
    vocab = 603 if device.type == "cpu" else 100_003
    scores = make_scores(6, vocab, device).to(dtype)
    best = scores.amax(-1) + 1
    scores[:, 300:] = best[:, None]
    scores[3:, 17] = best[3:]
    scores[5] = -0.0
    scores[5, 9:] = 0.0  # equal to -0
    expected = [300] * 3 + [17] * 2 + [0]
    params = make_params(6, vocab, device, FILTERS, greedy=1.0)
    params["temperature"] = torch.zeros_like(params["temperature"])  # not looked at
    plain = {**params, **dict.fromkeys(FILTERS)}
    for p in (params, plain, {**plain, "random": None}):
        tokens, finite = ops.draw(scores, **p)
        assert tokens.tolist() == expected
        assert finite.all()


def test_ties_at_a_threshold_are_kept_whole(device):
    """One row for each id, with noise that makes this id win unless it is filtered out."""
    noise = twin.gumbel(8, torch.arange(20_000), torch.zeros(20_000).long(), torch.zeros(20_000).long())
    top2 = noise.topk(2).values
    clear = top2[:, 0] - top2[:, 1] > 3.5
    seeds = torch.stack([(clear & (noise.argmax(-1) == v)).nonzero()[0, 0] for v in range(8)]).to(device)
    params = select(make_params(1, 8, device, greedy=0.0), torch.zeros(8).long()) | {"seeds": seeds}
    params["choices"] = params["positions"] = torch.zeros_like(seeds)
    params["temperature"] = torch.ones_like(params["temperature"])

    def kept(scores, **filters):
        for name, value in filters.items():
            filters[name] = torch.full_like(seeds if name == "top_k" else params["temperature"], value)
        tokens, finite = ops.draw(torch.tensor(scores, device=device).expand(8, 8), **(params | filters))
        assert finite.all()
        return (tokens == torch.arange(8, device=device)).nonzero()[:, 0].tolist()

    x = [1.0, 3.0, 2.0, 2.0, 2.0, 0.0, 2.0, 3.0]
    for k, ids in [(0, [*range(8)]), (1, [1, 7]), (2, [1, 7]), (3, [1, 2, 3, 4, 6, 7])]:
        assert kept(x, top_k=k) == ids
    for p, ids in [(0.1, [1, 7]), (0.7, [1, 2, 3, 4, 6, 7]), (0.9, [1, 2, 3, 4, 6, 7])]:
        assert kept(x, top_p=p) == ids
    assert kept(x, top_k=3, top_p=0.95) == [1, 2, 3, 4, 6, 7]
    assert kept(x, min_p=math.exp(-1.5)) == [1, 2, 3, 4, 6, 7]
    assert kept([-0.0, 0.0, -1.0, 0.0, -1.0, -INF, -1.0, -1.0], top_k=2) == [0, 1, 3]


@pytest.mark.parametrize("filters", [("top_k",), ("top_p",), ("top_k", "top_p"), FILTERS], ids="+".join)
def test_sets_end_where_the_twins_do(device, filters):
    """Each row twice: with noise that makes the last kept id win, and with noise that would the first dropped one."""
    rows, vocab = 8, 64
    g = torch.Generator().manual_seed(len(filters))
    scores = torch.randn(rows, vocab, generator=g) - 5  # together as heavy as one of the head; top-p leaves them out
    scores[:, 20:32] = torch.randn(rows, 12, generator=g) * 0.6 - 0.5
    scores[:, 40] = 0.5
    params = make_params(rows, vocab, device, filters, greedy=0.0)
    params["temperature"] = torch.ones_like(params["temperature"])
    params["choices"] = params["positions"] = torch.zeros_like(params["seeds"])
    for name, values in (("top_k", [4, 9, 0, 20]), ("top_p", [0.5, 0.6, 0.7, 0.8]), ("min_p", [0.0, 0.3, 0.1, 1e-4])):
        if name in filters:
            params[name] = torch.tensor(values, dtype=params[name].dtype, device=device).repeat(2)
    limits = {name: p if p is None else p.cpu() for name, p in params.items() if name in FILTERS}
    kept = twin.filter_logits(scores.clone(), **limits, max_top_k=vocab if "top_k" in filters else 0).isfinite()
    last = scores.masked_fill(~kept, INF).argmin(-1)
    dropped = scores.masked_fill(kept, -INF).argmax(-1)
    zeros = torch.zeros(20_000, dtype=torch.int64)
    winners = (twin.gumbel(vocab, torch.arange(20_000), zeros, zeros) + scores[:, None]).argmax(-1)  # [rows, seeds]
    wins = torch.cat([winners == last[:, None], winners == dropped[:, None]])
    assert wins.any(-1).sum() >= 1.5 * rows  # not where a set's end is too improbable, or nothing is dropped
    both = select(params, torch.arange(rows).repeat(2)) | {"seeds": wins.int().argmax(-1).to(device)}
    tokens = check(scores.repeat(2, 1).to(device), both, close_allowed=0).cpu()
    assert ((tokens[:rows] == last) | ~wins[:rows].any(-1)).all()
    assert ((tokens[rows:] != dropped) | kept.all(-1)).all()


@pytest.mark.parametrize("filters", [(), ("top_p",), FILTERS], ids="+".join)
def test_a_broken_row_is_reported_and_touches_no_other(device, filters):
    rows, vocab = 14, 500
    params = make_params(rows, vocab, device, filters, greedy=0.5)
    scores = make_scores(rows, vocab, device)
    fine = check(scores, params, close_allowed=0)
    broken = scores.clone()
    broken[[0, 1], 490] = NAN
    broken[[4, 5], 3] = INF
    broken[[8, 9]] = -INF
    broken[12] = NAN
    broken[13, 7], broken[13, 300] = NAN, INF
    bad = torch.tensor([0, 1, 4, 5, 8, 9, 12, 13], device=device)
    tokens, finite = ops.draw(broken, **params)
    assert (~finite).nonzero()[:, 0].tolist() == bad.tolist()
    assert (tokens[bad] == 0).all()
    assert torch.equal(tokens[finite], fine[finite])
    tokens, finite = ops.draw(broken, **{**params, "random": None})
    assert (~finite).nonzero()[:, 0].tolist() == bad.tolist()
    assert (tokens[bad] == 0).all()


def draw_alone(scores, params, row):
    """Without the filters that only other rows need."""
    params = select(params, slice(row, row + 1))
    for name, neutral in (("top_k", 0), ("top_p", 1), ("min_p", 0), ("random", 0)):
        if params[name] == neutral:
            params[name] = None
    return ops.draw(scores[row : row + 1], **params)[0]


def test_a_row_is_drawn_the_same_alone_or_among_others(device):
    rows, vocab = 9, 600
    params = make_params(rows, vocab, device, FILTERS)
    params["top_k"][::3], params["top_p"][::3], params["min_p"][::3] = 0, 1.0, 0.0
    scores = make_scores(rows, vocab, device)
    tokens, _ = ops.draw(scores, **params)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(ops.draw(scores[order], **select(params, order))[0], tokens[order])
    for row in range(rows):
        assert torch.equal(draw_alone(scores, params, row), tokens[row : row + 1])


def test_no_rows(device):
    scores = torch.empty(0, 100, device=device)
    for filters in ((), FILTERS):
        tokens, finite = ops.draw(scores, **make_params(0, 100, device, filters))
        assert tokens.shape == finite.shape == (0,)


# ---- only compiled ----


@gpu
@pytest.mark.parametrize("filters", SETS, ids="+".join)
@pytest.mark.parametrize("kind", ["model", "flat", "mixed"])
def test_a_full_vocabulary(device, dtype, kind, filters):
    rows, vocab = 256, 128_256
    scores = make_scores(rows, vocab, device, kind=kind).to(dtype)
    params = make_params(rows, vocab, device, filters)
    tokens = check(scores, params, close_allowed=2)
    for row in range(40):
        assert torch.equal(draw_alone(scores, params, row), tokens[row : row + 1])


@gpu
@pytest.mark.parametrize("filters", [(), FILTERS], ids="+".join)
@pytest.mark.parametrize("rows", [1, 7])
def test_capture_in_a_graph(device, filters, rows):
    vocab = 50_257
    scores, params = make_scores(rows, vocab, device), make_params(rows, vocab, device, filters)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ops.draw(scores, **params)  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        tokens, finite = ops.draw(scores, **params)
    for seed in range(5):
        scores.copy_(make_scores(rows, vocab, device, seed=seed))
        params["positions"] += 1
        graph.replay()
        expected, expected_finite = ops.draw(scores, **params)
        assert torch.equal(tokens, expected)
        assert torch.equal(finite, expected_finite)


@pytest.mark.parametrize("backend", [ops, twin], ids=["triton", "twin"])
@pytest.mark.parametrize("greedy", [1.0, 0.2])
def test_parts_of_a_vocabulary_draw_what_the_whole_does(backend, greedy, device):
    """Three ranks' candidates; a part that is not finite spoils the row, wherever it is."""
    rows, vocab = 8, 1000
    scores = make_scores(rows, vocab, device)
    scores[5, 999], scores[6, 3], scores[7] = INF, NAN, -INF
    params = make_params(rows, vocab, device, greedy=greedy)
    params = {name: params[name] for name in ("temperature", "random", "seeds", "choices", "positions")}
    parts = []
    for begin, end in ((0, 512), (512, 768), (768, 1000)):
        part = backend.draw_part(scores[:, begin:end], begin, **params)
        parts.append(torch.nn.functional.pad(part, (0, 2 - part.shape[-1]), value=-INF))
    tokens, finite = backend.best_of_parts(torch.stack(parts))
    expected = backend.draw(scores, **params)
    assert torch.equal(finite, expected[1])
    assert torch.equal(tokens, expected[0])
    assert finite.tolist() == [True] * 5 + [False] * 3
