"""The slab's GPU memory, over a driver that keeps books: what is mapped, what is refused, what is left at the end."""

from __future__ import annotations

import ctypes
import gc
import mmap
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flover.kv import storage as storage_module
from flover.kv.storage import KVStorage
from flover.kv.virtual_memory import VirtualRange, load_driver

UNIT = 4096
GARBAGE = 0x5A


class Contexts(threading.local):
    """Of each thread; only that of the owner has one."""

    def __init__(self, owner: threading.Thread) -> None:
        self.stack = ["the device's"] if threading.current_thread() is owner else []


class Driver:
    """CUDA's rules on host memory: mappings are whole, aligned, disjoint and useless before access is set."""

    def __init__(self, capacity: int = 1 << 30) -> None:
        self.capacity, self.calls = capacity, 0
        self.reserved: dict[int, mmap.mmap] = {}
        self.sizes: dict[int, int] = {}  # of reservations
        self.handles: dict[int, int] = {}
        self.mappings: dict[int, tuple[int, int]] = {}  # address -> size, handle
        self.accessible: set[int] = set()
        self.backing: dict[int, int] = {}  # bytes of handles that are held or mapped
        self.fail_at: str | None = None
        self.contexts = Contexts(threading.current_thread())
        one = SimpleNamespace
        self.CUmemLocationType = one(CU_MEM_LOCATION_TYPE_DEVICE=1)
        self.CUmemAllocationType = one(CU_MEM_ALLOCATION_TYPE_PINNED=1)
        self.CUmemAccess_flags = one(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
        self.CUmemAllocationGranularity_flags = one(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
        self.CUmemAllocationProp = lambda: one(location=one())
        self.CUmemAccessDesc = lambda: one(location=one())

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, {2: b"out of memory", 1: b"invalid argument", 201: b"invalid device context"}[status]

    def cuMemGetAllocationGranularity(self, properties: Any, _: int) -> tuple[int, int]:  # noqa: N802
        assert properties.location.id == 0
        return 0, UNIT

    def cuMemAddressReserve(self, size: int, *_: int) -> tuple[int, int]:  # noqa: N802
        assert size % UNIT == 0
        memory = mmap.mmap(-1, size)
        memory[:] = bytes([GARBAGE]) * size
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.reserved[address], self.sizes[address] = memory, size
        return 0, address

    def cuMemCreate(self, size: int, _: Any, __: int) -> tuple[int, ...]:  # noqa: N802
        assert size % UNIT == 0
        if self.fail_at == "cuMemCreate" or sum(self.backing.values()) + size > self.capacity:
            return 2, 0
        self.calls += 1
        self.handles[self.calls] = self.backing[self.calls] = size
        return 0, self.calls

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, _: int) -> tuple[int]:  # noqa: N802
        assert offset == 0
        assert size == self.handles[handle]
        assert any(base <= address and address + size <= base + self.sizes[base] for base in self.reserved)
        assert all(address + size <= a or a + s <= address for a, (s, _) in self.mappings.items())
        if self.fail_at == "cuMemMap":
            return (1,)
        self.mappings[address] = size, handle
        ctypes.memset(address, GARBAGE, size)
        return (0,)

    def cuMemRelease(self, handle: int) -> tuple[int]:  # noqa: N802
        del self.handles[handle]
        if all(mapped != handle for _, mapped in self.mappings.values()):
            del self.backing[handle]
        return (0,)

    def covered(self, address: int, size: int) -> list[int]:
        """Mappings that make up a range exactly."""
        inside = sorted(a for a in self.mappings if address <= a < address + size)
        at = address
        for a in inside:
            assert a == at, "a hole"
            at += self.mappings[a][0]
        assert at == address + size, "a mapping is cut"
        return inside

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> tuple[int]:  # noqa: N802
        assert (count, access[0].flags, access[0].location.type) == (1, 3, 1)
        if self.fail_at == "cuMemSetAccess":
            return (1,)
        self.accessible.update(self.covered(address, size))
        return (0,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[int]:  # noqa: N802
        for a in self.covered(address, size):
            length, handle = self.mappings.pop(a)
            self.accessible.discard(a)
            ctypes.memset(a, GARBAGE, length)
            if handle not in self.handles:
                del self.backing[handle]
        return (0,)

    def cuMemAddressFree(self, address: int, size: int) -> tuple[int]:  # noqa: N802
        assert self.sizes.pop(address) == size
        assert not any(address <= a < address + size for a in self.mappings)
        del self.reserved[address]
        return (0,)

    def cuCtxGetCurrent(self) -> tuple[int, str]:  # noqa: N802
        return 0, self.contexts.stack[-1]

    def cuCtxPushCurrent(self, context: str) -> tuple[int]:  # noqa: N802
        self.contexts.stack.append(context)
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, str]:  # noqa: N802
        return 0, self.contexts.stack.pop()

    def cuCtxSynchronize(self) -> tuple[int]:  # noqa: N802
        return (0 if self.contexts.stack else 201,)

    def check(self, memory: VirtualRange) -> None:
        """Mapped and accessible is what the range says, no more."""
        for start, end in ((0, memory.head), (memory.tail, memory.size)):
            self.covered(memory.address + start, end - start)
        mapped = memory.head + memory.size - memory.tail
        assert sum(self.backing.values()) == mapped == sum(s for s, _ in self.mappings.values())
        assert self.accessible == set(self.mappings)
        assert not self.handles


def empty(driver: Driver) -> bool:
    return not (driver.reserved or driver.mappings or driver.backing or driver.handles)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 300 * UNIT),
    st.floats(0, 1),
    st.lists(st.integers(0, 320 * UNIT), max_size=12),
)
def test_mapped_is_what_was_asked_for(size: int, keep: float, targets: list[int]) -> None:
    driver = Driver()
    kept = int(size * keep)
    memory = VirtualRange(size, kept, driver)
    address = memory.address
    head = 0
    for target in targets:
        fresh = memory.resize(target)
        assert fresh == (min(head, memory.head), memory.head)
        head = memory.head
        assert min(target, memory.tail) <= head < target + memory.chunk or head == 0
        assert memory.tail <= kept < memory.tail + UNIT
        assert memory.size - size < UNIT
        assert memory.size <= memory.chunk * 32
        driver.check(memory)
    assert memory.address == address
    del memory
    assert empty(driver)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_thread_without_a_context_may_be_the_last_to_know_it() -> None:
    driver = Driver()
    last = [VirtualRange(100 * UNIT, UNIT, driver)]
    last[0].resize(20 * UNIT)
    dropping = threading.Thread(target=last.clear)
    dropping.start()
    dropping.join()
    assert empty(driver)


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_refusal_changes_nothing(call: str) -> None:
    driver = Driver()
    memory = VirtualRange(100 * UNIT, 99 * UNIT, driver)
    memory.resize(20 * UNIT)
    head, driver.fail_at = memory.head, call
    with pytest.raises(RuntimeError, match=rf"^{call} failed: (out of memory|invalid argument) \(\d\)$"):
        memory.resize(80 * UNIT)
    assert memory.head == head
    driver.check(memory)
    with pytest.raises(RuntimeError, match=call):
        VirtualRange(100 * UNIT, 99 * UNIT, driver)
    gc.collect()
    driver.check(memory)
    driver.fail_at = None
    assert memory.resize(80 * UNIT) == (head, memory.head)
    del memory
    assert empty(driver)


SHAPE = 2, 16, 8, 4, 64  # layers, blocks, block size, heads, head size: a block of one unit in bf16


def elastic(monkeypatch: pytest.MonkeyPatch, driver: Any) -> KVStorage:
    def over(memory: VirtualRange, _: torch.device) -> torch.Tensor:
        return torch.frombuffer(driver.reserved[memory.address], dtype=torch.uint8)

    monkeypatch.setattr(storage_module, "load_driver", lambda: driver)
    monkeypatch.setattr(storage_module, "_bytes_of", over)
    monkeypatch.setattr(storage_module, "_wait_for", lambda _: None)
    monkeypatch.setattr("flover.kv.virtual_memory.CHUNKS", 32)  # a block each
    return KVStorage(*SHAPE, torch.bfloat16, torch.device("cuda", 0), "torch", elastic=True)


def test_storage_releases_and_takes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    storage = elastic(monkeypatch, driver)
    block = storage.block_size * 4 * 64 * 2
    assert sum(driver.backing.values()) == 4 * 2 * block  # one block and scratch of each cache
    assert storage.k[0][storage.scratch :].eq(0).all()
    storage.apply([], [], 12)
    assert sum(driver.backing.values()) == 4 * 13 * block
    addresses = [cache.data_ptr() for cache in storage.k + storage.v]
    for cache in storage.k + storage.v:
        assert cache[: 12 * 8].eq(0).all()
        cache[: 12 * 8] = torch.arange(96).repeat_interleave(256).view(96, 4, 64)
    storage.apply([(11, 2, 8), (7, 1, 5)], [11, 7], 3)  # the copies come before the tail goes
    assert sum(driver.backing.values()) == 4 * 4 * block
    for cache in storage.k + storage.v:
        assert cache[16, 0, 0] == 88
        assert cache[12, 3, 1] == 60
        assert cache[13, 0, 0] == 13
    storage.apply([], [], 16)
    for cache in storage.k + storage.v:
        assert cache[23, 0, 0] == 95
        assert cache[3 * 8 :].eq(0).all()
    assert addresses == [cache.data_ptr() for cache in storage.k + storage.v]
    del storage, cache
    gc.collect()
    assert empty(driver)


def test_storage_without_room_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(capacity=40 * UNIT)
    storage = elastic(monkeypatch, driver)
    storage.apply([], [], 4)
    mapped = sum(driver.backing.values())
    with pytest.raises(
        RuntimeError, match=r"^no memory for 12 slots of the KV cache: cuMemCreate failed: out of memory"
    ):
        storage.apply([], [], 12)
    assert sum(driver.backing.values()) == mapped
    storage.apply([], [], 8)  # this much there is
    assert sum(driver.backing.values()) == mapped * 9 // 5


def test_no_driver_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing() -> Any:
        raise RuntimeError("the package cuda-bindings cannot be loaded (ModuleNotFoundError)")

    monkeypatch.setattr(storage_module, "load_driver", missing)
    monkeypatch.setattr(KVStorage, "_allocate", lambda _, shape, dtype, __: torch.zeros(shape, dtype=dtype))
    storage = KVStorage(*SHAPE, torch.bfloat16, torch.device("cuda", 0), "torch", elastic=True)
    assert "keeps all its memory" in caplog.text
    storage.apply([], [], 16)


def test_load_driver_says_why() -> None:
    try:
        load_driver()
    except RuntimeError as error:
        assert "cuda-bindings" in str(error)  # noqa: PT017
