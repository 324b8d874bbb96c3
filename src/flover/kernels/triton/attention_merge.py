"""What becomes of an entry's shares in decode attention: each leaves its state, and the last to arrive merges them.

States lie in `part_acc` `[kv_heads, num_shares, group, HEAD_DIM]` and `part_m` `[kv_heads, num_shares, 2, group]`
(maxima, sums), those of an entry side by side. Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_part(part_acc, part_m, part, state, h, d, group: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What `_part` loads; only real heads go through memory."""
    m, total, acc = state
    real = h < group
    mask = real[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(part_acc + (part * group + h[:, None]) * HEAD_DIM + d[None, :], acc, mask=mask)
    tl.store(part_m + part * 2 * group + h, m, mask=real)
    tl.store(part_m + (part * 2 + 1) * group + h, total, mask=real)


@triton.jit
def _part(part_acc, part_m, first, i, used, h, d, group: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The state that share i of an entry left; behind the last one that is used, a state that changes nothing."""
    part = first + i
    real = h < tl.where(i < used, group, 0)
    m = tl.load(part_m + part * 2 * group + h, mask=real, other=0.0, cache_modifier=".cg")
    m = tl.where(i < used, m, float("-inf"))
    total = tl.load(part_m + (part * 2 + 1) * group + h, mask=real, other=0.0, cache_modifier=".cg")
    where = (part * group + h[:, None]) * HEAD_DIM + d[None, :]
    mask = real[:, None] & (d < HEAD_DIM)[None, :]
    return m, total, tl.load(part_acc + where, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _with(m, total, acc, m_i, total_i, acc_i):
    higher = tl.maximum(m, m_i)
    a, b = tl.exp2(m - higher), tl.exp2(m_i - higher)
    return higher, total * a + total_i * b, acc * a[:, None] + acc_i * b[:, None]


@triton.jit
def _merged(part_acc, part_m, first, used, h, d, group: tl.constexpr, HEAD_DIM: tl.constexpr):
    """total and acc of the shares first, first + 1, ...: in order, so that the result is always the same.

    Three at a time are on their way, or each would wait for the memory in turn.
    """
    m, total, acc = _part(part_acc, part_m, first, 0, used, h, d, group, HEAD_DIM)
    for i in range(1, used, 3):
        m1, total1, acc1 = _part(part_acc, part_m, first, i, used, h, d, group, HEAD_DIM)
        m2, total2, acc2 = _part(part_acc, part_m, first, i + 1, used, h, d, group, HEAD_DIM)
        m3, total3, acc3 = _part(part_acc, part_m, first, i + 2, used, h, d, group, HEAD_DIM)
        m, total, acc = _with(m, total, acc, m1, total1, acc1)
        m, total, acc = _with(m, total, acc, m2, total2, acc2)
        m, total, acc = _with(m, total, acc, m3, total3, acc3)
    return total, acc


@triton.jit
def _store_heads(out, result, first_head, h, d, group: tl.constexpr, HEAD_DIM: tl.constexpr):
    total, acc = result
    mask = (h < group)[:, None] & (d < HEAD_DIM)[None, :]
    where = (first_head + h[:, None]) * HEAD_DIM + d[None, :]
    tl.store(out + where, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
