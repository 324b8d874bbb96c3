"""A batch taken apart: each part has its rows, and of the prefill ids those of its rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flover.engine.runner import Batch

ROW = st.tuples(st.integers(1, 9), st.booleans(), st.booleans())


@given(st.lists(ROW, min_size=1, max_size=12))
def test_parts_hold_their_rows_and_ids(rows: list[tuple[int, bool, bool]]) -> None:
    counts = np.array([n for n, _, _ in rows])
    in_prefill = np.array([p for _, p, _ in rows])
    chosen = np.array([c for _, _, c in rows])
    ids = [100 * row + i for row, (n, prefill, _) in enumerate(rows) if prefill for i in range(n)]
    index = np.arange(len(rows))
    batch = Batch(index, counts, 3 * index, index % 2 == 0, in_prefill, index % 3 == 0, np.array(ids, dtype=np.int32))
    for mask in (chosen, ~chosen):
        part = batch.part(mask)
        assert part.rows.tolist() == index[mask].tolist()
        assert part.counts.tolist() == counts[mask].tolist()
        assert part.start.tolist() == (3 * index[mask]).tolist()
        assert part.prefill_ids.tolist() == [i for i in ids if mask[i // 100]]
        assert part.samples.tolist() == (index[mask] % 3 == 0).tolist()
