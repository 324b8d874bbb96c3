"""The anatomy of steps from made-up events, whose every number is known."""

from __future__ import annotations

from itertools import pairwise

import pytest

from flover.anatomy import (
    ATTENTION,
    OTHER,
    PRODUCT,
    TRANSFER,
    Event,
    Row,
    Work,
    anatomy,
    exclusive,
    kind_of,
    short_name,
)

COPY, RESULT = "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pinned)"


def step(at: float) -> list[Event]:
    """100 us: a copy, two products of which the second starts early, a gap of 5, attention; its result leaves later."""
    return [
        Event(COPY, at, at + 2),
        Event("_linear", at + 3, at + 23),
        Event("_linear", at + 13, at + 53),  # 10 us of them while the first still runs
        Event("decode", at + 58, at + 98),
        Event(RESULT, at + 99, at + 104),  # beside the next step's copy, on another stream
    ]


def row(rows: tuple[Row, ...], name: str) -> Row:
    (found,) = (r for r in rows if r.name == name)
    return found


def three_steps() -> tuple[list[Event], list[float]]:
    starts = [1000.0, 1100.0, 1210.0]
    return [event for at in starts for event in step(at)], starts


def test_time_is_accounted_for() -> None:
    events, starts = three_steps()
    found = anatomy(reversed(events), starts, 3)
    assert found.span_us == pytest.approx(95)
    assert found.busy_us == pytest.approx(90)
    assert found.gaps_us == pytest.approx(5)
    assert found.between_us == pytest.approx((5 + 15) / 2)  # kernel to kernel
    assert found.between_median_us == pytest.approx(10)
    assert found.between_idle_us == pytest.approx((2 + 12) / 2)  # until the copy begins
    assert found.step_us == pytest.approx(105)
    assert sum(r.us for r in found.kernels if r.kind != TRANSFER) == pytest.approx(found.busy_us)


def test_own_time_is_what_a_kernel_adds() -> None:
    events, starts = three_steps()
    found = anatomy(events, starts, 3)
    linear = row(found.kernels, "_linear")
    assert (linear.launches, linear.us, linear.elapsed_us) == pytest.approx((2, 50, 60))
    assert linear.share == pytest.approx(50 / 105)
    assert row(found.kernels, "decode").us == pytest.approx(40)
    assert row(found.sums, TRANSFER).us == pytest.approx(7)
    assert [r.name for r in found.kernels] == ["_linear", "decode", RESULT, COPY]


def test_rates_where_the_work_is_known() -> None:
    events, starts = three_steps()
    found = anatomy(events, starts, 3, [Work(100e6, 1e9), Work(50e6, 3e9)], Work(80e6, 2e9))
    linear = row(found.kernels, "_linear")
    assert linear.tb_per_s == pytest.approx(150e6 / 50e-6 / 1e12)
    assert linear.tflop_per_s == pytest.approx(4e9 / 50e-6 / 1e12)
    assert row(found.kernels, "decode").tb_per_s == pytest.approx(2.0)
    assert row(found.kernels, COPY).tb_per_s is None
    assert row(found.sums, PRODUCT).tb_per_s == pytest.approx(3.0)


def test_products_that_do_not_match_have_only_a_sum() -> None:
    events, starts = three_steps()
    found = anatomy(events, starts, 3, [Work(150e6, 4e9)])
    assert row(found.kernels, "_linear").tb_per_s is None
    assert row(found.sums, PRODUCT).tb_per_s == pytest.approx(3.0)


def test_each_product_gets_its_own_work() -> None:
    events = [Event("nvjet", 0, 10), Event("splitKreduce", 10, 11), Event("_linear", 11, 31)]
    found = anatomy(events, [0.0], 1, [Work(10e6, 0), Work(60e6, 0)])
    assert row(found.kernels, "nvjet").tb_per_s == pytest.approx(1.0)
    assert row(found.kernels, "_linear").tb_per_s == pytest.approx(3.0)
    assert row(found.kernels, "splitKreduce").tb_per_s is None
    assert row(found.sums, PRODUCT).us == pytest.approx(31)


@pytest.mark.parametrize("starts", [[], [1000.0, 1100.0], [1000.0, 1050.0, 1100.0, 1210.0]])
def test_steps_that_cannot_be_told_apart_are_one_stretch(starts: list[float]) -> None:
    events, _ = three_steps()
    found = anatomy(events, starts, 3)
    assert found.between_us is None
    assert found.span_us == pytest.approx((1308 - 1003) / 3)
    assert found.busy_us == pytest.approx(90)
    assert found.step_us == found.span_us


def test_what_ran_before_the_first_step_is_not_of_it() -> None:
    events, starts = three_steps()
    found = anatomy([Event("early", 900, 999), *events], starts, 3)
    assert found.span_us == pytest.approx(95)
    assert "early" not in [r.name for r in found.kernels]


def test_nothing_recorded() -> None:
    with pytest.raises(ValueError, match="no kernel"):
        anatomy([Event(COPY, 0, 1)], [0.0], 1)


def test_nested_ops_give_each_moment_to_the_innermost() -> None:
    nested = [Event("a", 0, 100), Event("b", 10, 40), Event("c", 10, 20), Event("b", 50, 60), Event("d", 100, 110)]
    flat = exclusive(nested)
    assert flat == sorted(flat, key=lambda e: e.start)
    times: dict[str, list[float]] = {}
    for event in flat:
        entry = times.setdefault(event.name, [0, 0])
        entry[0] += event.end - event.start
        entry[1] += event.launches
    assert times == {"a": [60, 1], "b": [30, 2], "c": [10, 1], "d": [10, 1]}
    assert all(one.end <= two.start for one, two in pairwise(flat))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_linear", PRODUCT),
        ("_one_row", PRODUCT),
        ("nvjet_sm90_tst_256x8_64x6_2x1_v_bz_TNT", PRODUCT),
        ("void cublasLt::splitKreduce_kernel<32, 16>(int)", PRODUCT),
        ("mkldnn::_linear_pointwise", PRODUCT),
        ("aten::addmm", PRODUCT),
        ("aten::linear", OTHER),  # its time is that of the product inside
        ("decode", ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("aten::rms_norm", OTHER),
        ("_norm", OTHER),
        ("Memcpy DtoD (Device -> Device)", OTHER),  # a copy that stays on the device is a kernel like any other
        (RESULT, TRANSFER),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_one_row", "_one_row"),
        (COPY, COPY),
        (
            "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::Type<2u>, 64>(char*)",
            "CatArrayBatchedCopy",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, char*>"
            "(int, at::native::CUDAFunctor_add<float>)",
            "vectorized_elementwise_…AFunctor_add",
        ),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name, 36) == short
    assert len(short_name(name * 3, 20)) <= 20
