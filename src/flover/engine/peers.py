"""Memory of every rank of one machine that the others read and write: allocated by each, opened by all (CUDA IPC)."""

from __future__ import annotations

import ctypes
import socket
import weakref
from contextlib import suppress
from typing import Any

import torch

from flover.kernels.triton.exchange import EMPTY, PROGRAMS, Exchange
from flover.kv.virtual_memory import call, load_driver

CAPACITY = 2 << 20  # bytes of a message; larger ones are NCCL's, which is as fast from there on
HANDLE = 64  # bytes of a CUipcMemHandle


def open_exchange(store: Any, rank: int, size: int, device: torch.device) -> Exchange | None:
    """The ranks' buffers, on all of them or, where one cannot open another's, on none; waits for all.

    Args:
        store: a torch.distributed store that they share. device: this rank's, which no other has.
    """
    driver, opened = None, list[int]()
    num_bytes = 2 * size * CAPACITY
    torch.cuda.current_stream(device).synchronize()  # the context exists, and is current
    try:
        driver = load_driver()
        own = int(call(driver, "cuMemAlloc", num_bytes))
        opened.append(own)
        call(driver, "cuMemsetD16", own, EMPTY, num_bytes // 2)
        call(driver, "cuCtxSynchronize")
        handle = call(driver, "cuIpcGetMemHandle", own)
        store.set(f"exchange/{rank}", socket.gethostname().encode() + b"\0" + ctypes.string_at(handle.getPtr(), HANDLE))
    except RuntimeError as error:
        store.set(f"exchange/{rank}", str(error).encode())
    addresses = []
    for other in range(size):
        host, _, theirs = bytes(store.get(f"exchange/{other}")).partition(b"\0")
        with suppress(RuntimeError):
            if other == rank and opened:
                addresses.append(own)
            elif len(theirs) == HANDLE and host == socket.gethostname().encode() and opened:
                copy = driver.CUipcMemHandle()  # type: ignore[union-attr]
                ctypes.memmove(copy.getPtr(), theirs, HANDLE)
                lazily = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS  # type: ignore[union-attr]
                addresses.append(int(call(driver, "cuIpcOpenMemHandle", copy, lazily)))
    store.set(f"exchange/{rank}/all", str(len(addresses) == size))
    everybody = [bytes(store.get(f"exchange/{other}/all")) == b"True" for other in range(size)]
    others = [address for address in addresses if address not in opened]
    if not all(everybody):
        _free(driver, others, opened)
        return None
    exchange = Exchange(
        tuple(addresses),
        torch.zeros(PROGRAMS.value, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, pin_memory=True),
        rank,
        CAPACITY,
    )
    weakref.finalize(exchange.stop, _free, driver, others, opened).atexit = False  # the end of a process frees all
    return exchange


def _free(driver: Any, others: list[int], own: list[int]) -> None:
    for address in others:
        with suppress(RuntimeError):
            call(driver, "cuIpcCloseMemHandle", address)
    for address in own:
        with suppress(RuntimeError):
            call(driver, "cuMemFree", address)
