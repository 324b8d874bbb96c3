"""How often a kernel is compiled: once, wherever in the staging buffer a step's parts lie and however many they are.

Triton specialises on whether a pointer is a multiple of 16 bytes, and on integers that are 1 or a multiple of 16; each
new combination compiles for half a second in mid-serving. What it would specialise on can be had without a GPU:
launches are replaced by what makes their cache key, in a process where kernels are not interpreted.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_device import DEVICE

SOURCE = str(Path(__file__).parents[3] / "src")
SCRIPT = r"""
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

backend = make_backend(GPUTarget("cuda", 90, 32))
keys = {}


def run(self, *args, grid, warmup, **options):
    binder = jit.create_function_from_signature(self.signature, self.params, backend)
    _, specialization, _ = binder(*args, **options)
    keys.setdefault(self.__name__, set()).add(str(specialization))


jit.JITFunction.run = run
from flover.kernels.triton import attention, draw, rotary_tables
from flover.kernels.triton.attention import DeviceMetadata
from flover.kernels.triton.inputs import edit_tables, token_inputs
from flover.kernels.triton.wide import Cut, gated_wide

staging = torch.zeros(4096, dtype=torch.int32)
assert staging.data_ptr() % 16 == 0


def part(size):  # parts of a step lie one behind the other
    global at
    at += size
    return staging[at - size : at]


caches = [torch.zeros(512, 2, 16, dtype=torch.float16) for _ in "kv"]
table, tokens = torch.zeros(9, 32, dtype=torch.int32), torch.zeros(2, 999, dtype=torch.int64)
for offset in range(5):
    for n in (1, 2, 3, 16, 33):
        at = offset
        q, k, v = torch.zeros(n, 8 * 16, dtype=torch.float16).unflatten(-1, (-1, 16)).split([4, 2, 2], 1)
        ids, positions, rows = part(n), part(n), part(n)
        token_inputs(ids, positions, rows, tokens[0], table, 16, *tokens[:, :n])
        edit_tables(staging[at:], n, table)
        cos, sin = rotary_tables(positions, torch.ones(3), torch.float16)
        decode = n // 2
        shares = part(1), part(n), part(n)
        meta = DeviceMetadata(table, part(n), part(n), part(n + 1), decode, *shares, part(n), part(n), 64, 16, False)
        attention(q, k, v, *caches, tokens[1, :n], meta, rotary=(cos, sin, False), scale=0.1)
        fields = torch.zeros(16, n, dtype=torch.int64)[1::2]  # rows that an odd n puts off 16 bytes
        wide = fields.view(torch.float64)
        filters = {"top_k": fields[4], "top_p": wide[5], "min_p": wide[6]}
        for extra in ({}, filters):
            draw(torch.zeros(n, 100), temperature=wide[0], random=wide[1], seeds=fields[2], choices=fields[3],
                 positions=fields[7], **extra)
gate_up = torch.zeros(2 * 256, 128, dtype=torch.float16)
for n in (65, 66, 80, 127, 128):
    gated_wide(torch.zeros(n, 128 + 8 * n, dtype=torch.float16)[:, 8 : 8 + 128], gate_up, "silu", Cut(112, 4))
print(json.dumps({name: sorted(found) for name, found in keys.items()}))
"""


def test_every_kernel_has_one_variant():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    if "ImportError" in done.stderr or "AttributeError: module 'triton" in done.stderr:
        pytest.skip(f"another version of Triton: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    keys = json.loads(done.stdout)
    kernels = {
        "decode",
        "prefill",
        "_token_inputs",
        "_edit_tables",
        "_rotary_store",
        "_tables",
        "_select",
        "_gated_linear",
    }
    assert kernels <= set(keys)
    assert {name: len(found) for name, found in keys.items()} == dict.fromkeys(keys, 1), keys


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_gpu_compiles_once():
    from test_triton_attention import Batch

    from flover.kernels.triton.attention_kernels import prefill

    def compiled():
        return sum(len(caches[0]) for caches in prefill.device_caches.values())

    batch = Batch([20, 40], [20, 90], 4, 2, 48, torch.float16)
    meta = batch.meta()
    want, before = batch.attend(meta, scale=0.1), compiled()
    for offset in range(1, 5):
        for name in ("rows", "seq_lens", "query_start", "tile_entry", "tile_start"):
            part = getattr(meta, name)
            moved = torch.zeros(len(part) + offset, dtype=torch.int32, device=DEVICE)[offset:]
            setattr(meta, name, moved.copy_(part))
        assert torch.equal(batch.attend(meta, scale=0.1), want)
    assert compiled() == before
