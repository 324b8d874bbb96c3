"""Decode attention in shares of all entries' keys, whatever the lengths, against the twin in float64."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton_attention import TOLERANCE, Batch
from test_triton_fp8 import OLD
from triton_device import DEVICE, DTYPES

from flover.kernels.triton.attention import attention
from flover.kernels.triton.common import arrivals

LENS = st.lists(st.sampled_from([0, 1, 63, 64, 65, 127, 128, 129]) | st.integers(0, 400), min_size=1, max_size=6)


@settings(max_examples=8 if DEVICE.type == "cpu" else 40, deadline=None)  # the interpreter is slow
@given(
    lens=LENS.filter(any),
    padding=st.sampled_from([0, 1, 3]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (3, 3)]),
    programs=st.sampled_from([1, 4, 12, 528]),
    fill=st.sampled_from([1, 3, 8]),
    window=st.sampled_from([None, 1, 40, 64, 65, 128]),
    block_size=st.sampled_from([16, 400]),  # the latter: a slab
    dtype=st.sampled_from(DTYPES),
    fp8=st.just(False) if OLD else st.booleans(),
)
def test_decode_is_the_twin_whatever_the_lengths(lens, padding, heads, programs, fill, window, block_size, dtype, fp8):
    """programs: that fill the GPU; with few the shares are long. fill: the same where entries alone fill it. New keys
    and values are stored by one share each.
    """
    batch = Batch([1] * (len(lens) + padding), lens + [0] * padding, *heads, 16, dtype, block_size=block_size)
    if fp8:
        batch.k, batch.v = batch.k.to(torch.float8_e4m3fn), batch.v.to(torch.float8_e4m3fn)
    new, filled = batch.new(), [batch.k.float(), batch.v.float()]
    for cache in (batch.k, batch.v):
        cache.view(torch.uint8)[new[2][new[2] >= 0]] = 0xFF  # NaN until it is stored
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[attention.__module__], "PROGRAMS", programs)
        patch.setattr(sys.modules[attention.__module__], "FILL", fill)
        got = batch.attend(batch.meta(len(batch.seq_lens), padding=padding), new, scale=0.3, window=window)
    for mine, theirs in zip((batch.k, batch.v), filled):
        assert torch.equal(mine.float().nan_to_num(9.0), theirs.nan_to_num(9.0))
    keep, want = batch.expected(scale=0.3, window=window)
    assert (got[keep].double() - want).abs().max() < TOLERANCE[dtype] * max(1.0, want.abs().max().item())
    assert not arrivals(DEVICE).any()
