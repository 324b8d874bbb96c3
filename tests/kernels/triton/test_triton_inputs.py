"""The first kernels of a step, against what they are said to do, in plain Python."""

import random

import torch
from triton_device import DEVICE

from flover.kernels.triton.inputs import edit_tables, token_inputs


def test_table_edits_write_what_they_name_and_nothing_else():
    rng = random.Random(0)
    table = torch.full((7, 200), -5, dtype=torch.int32, device=DEVICE)
    want = table.clone()
    edits = [(3, 0, 150), (0, 10, 1), (6, 190, 10), (2, 5, 0)]
    head, ids = [], []
    for row, first, count in edits:
        values = [rng.randrange(1000) for _ in range(count)]
        head += [row, first, count, 4 * len(edits) + len(ids)]
        ids += values
        want[row, first : first + count] = torch.tensor(values, dtype=torch.int32)
    edit_tables(torch.tensor(head + ids, dtype=torch.int32, device=DEVICE), len(edits), table)
    assert torch.equal(table, want)


def test_ids_come_from_the_host_or_from_the_row_and_slots_from_the_table():
    rows, blocks, size, n = 5, 6, 16, 300
    g = torch.Generator().manual_seed(0)
    table = torch.randperm(rows * blocks, generator=g).int().view(rows, blocks)
    last = torch.randint(0, 1000, (rows,), generator=g)
    ids = torch.randint(-1, 5, (n,), generator=g).int()
    positions = torch.randint(0, blocks * size, (n,), generator=g).int()
    token_rows = torch.randint(-1, rows, (n,), generator=g).int()
    input_ids, slots = torch.full((2, n + 3), 77, device=DEVICE)
    parts = [t.to(DEVICE) for t in (ids, positions, token_rows, last, table)]
    token_inputs(*parts, size, input_ids[:n], slots[:n])
    for i in range(n):
        row, position = int(token_rows[i]), int(positions[i])
        drawn = 0 if row < 0 else int(last[row])
        assert input_ids[i] == (ids[i] if ids[i] >= 0 else drawn)
        slot = -1 if row < 0 else int(table[row, position // size]) * size + position % size
        assert slots[i] == slot
    assert (input_ids[n:] == 77).all()
    assert (slots[n:] == 77).all()
