"""Arrival counters belong to a stream; and two streams that decode at once do not disturb each other."""

from types import SimpleNamespace

import pytest
import torch
from test_triton_attention import Batch, attention, check
from triton_device import DEVICE

from flover.kernels.triton import common


def test_counters_by_device_and_stream(monkeypatch):
    state = SimpleNamespace(stream=5, capturing=False)
    monkeypatch.setattr(common, "_arrivals", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: object())
    one, two = torch.device("cuda", 0), torch.device("cuda", 1)
    five = common.arrivals(one)
    assert common.arrivals(one) is five
    assert common.arrivals(two) is not five
    state.stream = 6
    assert common.arrivals(one) is not five
    state.stream, state.capturing = 5, True
    assert common.arrivals(one) is five  # the runner's own stream, which launched before it captures
    state.stream = 7
    assert common.arrivals(one) is not common.arrivals(one)  # the graph's own
    state.capturing = False
    assert common.arrivals(one) is common.arrivals(one)


def test_without_streams_there_is_one():
    cpu = torch.device("cpu")
    assert common.arrivals(cpu) is common.arrivals(cpu)


def test_a_launch_that_counts_more_units_than_there_are_counters(monkeypatch):
    """Behind the counters lies other memory."""

    def zeros(size, **options):
        return torch.full((size + 64,), 5, **options)[:size].zero_()

    batch = Batch([1, 1], [300, 200], 4, 2, 16, torch.float32)
    monkeypatch.setattr(common, "ARRIVALS", 3)
    monkeypatch.setattr(common, "_arrivals", {})
    monkeypatch.setattr(torch, "zeros", zeros)
    check(batch, torch.float32, num_decode=2, scale=0.3)


@pytest.mark.parametrize("wrong", ["transposed", "gaps"])
def test_heads_that_do_not_lie_side_by_side_are_refused(wrong):
    batch = Batch([1], [30], 4, 2, 16, torch.float16)
    q = batch.q.transpose(1, 2).contiguous().transpose(1, 2) if wrong == "transposed" else batch.q[:, ::2]
    with pytest.raises(AssertionError):
        attention(q, *batch.new()[:2], batch.k, batch.v, batch.slots(), batch.meta(1), scale=0.1)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_two_streams_decode_at_once():
    batches = [Batch([1] * 3, [3000, 2000, 700], 16, 4, 128, torch.float16, seed=seed) for seed in (0, 1)]
    metas, news = [batch.meta(3) for batch in batches], [batch.new() for batch in batches]
    want = [b.attend(meta, new, scale=0.1) for b, meta, new in zip(batches, metas, news)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(200):
        got = []
        for b, meta, new, stream in zip(batches, metas, news, streams):
            with torch.cuda.stream(stream):
                got.append(b.attend(meta, new, scale=0.1))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_capture_on_a_stream_that_never_launched():
    batch = Batch([1], [3000], 8, 2, 64, torch.float16)
    meta, new = batch.meta(1), batch.new()
    want = batch.attend(meta, new, scale=0.1)
    stream, graphs = torch.cuda.Stream(), []
    for _ in range(2):  # the second must not build on what the first left
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = batch.attend(meta, new, scale=0.1)
        graphs.append((graph, out))
    for graph, out in reversed(graphs):
        for _ in range(3):
            out.zero_()
            graph.replay()
            assert torch.equal(out, want)
