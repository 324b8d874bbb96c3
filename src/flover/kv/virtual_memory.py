"""GPU memory behind fixed addresses: a virtual range is reserved, its head is mapped and unmapped as it is needed.

CUDA's virtual memory API, as NVIDIA's sample vectorAddMMAP uses it: a handle is released as soon as it is mapped, so
that unmapping frees the memory, and one call unmaps many mappings. Invariant: what is mapped is `[0, head)` and `[tail,
size)`, and every mapping ends at a multiple of `chunk`, at `tail` or at `size`.
"""

from __future__ import annotations

import weakref
from importlib import import_module
from typing import Any

CHUNKS = 8  # pieces that a range comes and goes in, at most: a release of half takes 21 ms, of 32 pieces 49, of 98 90


def load_driver() -> Any:
    """`cuda.bindings.driver`, a package that comes with PyTorch's CUDA builds.

    Raises:
        RuntimeError: it is not there, or cannot be loaded.
    """
    try:
        return import_module("cuda.bindings.driver")
    except Exception as error:  # its own errors too, where there is no NVIDIA driver
        raise RuntimeError(f"the package cuda-bindings cannot be loaded ({type(error).__name__})") from None


class VirtualRange:
    """Bytes on a GPU whose address never changes; freed when nothing refers to the object any more.

    The device's context must be current in the thread that makes it, not in the one that drops it.
    `torch.as_tensor(self, device="cuda")` is a uint8 tensor over all of it, which keeps it alive; only what is mapped
    may be touched. New memory has undefined contents.

    Args:
        num_bytes: of the range. keep: the bytes from here on always stay mapped.
        driver: `load_driver()`. device: its index.

    Raises:
        RuntimeError: CUDA refuses, in one line.
    """

    def __init__(self, num_bytes: int, keep: int, driver: Any, device: int = 0) -> None:
        self._driver = driver
        self._properties, self._access = driver.CUmemAllocationProp(), driver.CUmemAccessDesc()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for one in (self._properties, self._access):
            one.location.type, one.location.id = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, device
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        unit = int(call(driver, "cuMemGetAllocationGranularity", self._properties, minimum))
        self.size = -(-num_bytes // unit) * unit
        self.chunk = -(-self.size // (CHUNKS * unit)) * unit
        self.tail = min(keep, num_bytes) // unit * unit
        self.address = int(call(driver, "cuMemAddressReserve", self.size, 0, 0, 0))
        self._mapped = [0, self.size]  # where the head ends, where the tail begins; the finaliser's, so not attributes
        context = call(driver, "cuCtxGetCurrent")
        free = weakref.finalize(self, _free, driver, context, self.address, self.size, self._mapped)
        free.atexit = False  # the end of the process frees everything, and CUDA may be gone by then
        self._map(self.tail, self.size)
        self._mapped[1] = self.tail

    @property
    def head(self) -> int:
        """Bytes mapped from the start on."""
        return self._mapped[0]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.size,), "typestr": "|u1", "data": (self.address, False), "strides": None, "version": 3}

    def resize(self, num_bytes: int) -> tuple[int, int]:
        """Map `[0, num_bytes)`, rounded up to a chunk, and nothing else before the tail; -> the bytes that are new.

        The caller makes sure that nothing enqueued reads what goes. RuntimeError if CUDA refuses; nothing has changed.
        """
        old, new = self.head, min(-(-num_bytes // self.chunk) * self.chunk, self.tail)
        if new > old:
            self._map(old, new)
        elif new < old:
            call(self._driver, "cuMemUnmap", self.address + new, old - new)
        self._mapped[0] = new
        return min(old, new), new

    def _map(self, start: int, end: int) -> None:
        at = start
        try:
            while at < end:
                size = min(self.chunk, end - at)
                handle = call(self._driver, "cuMemCreate", size, self._properties, 0)
                try:
                    call(self._driver, "cuMemMap", self.address + at, size, 0, handle, 0)
                finally:
                    call(self._driver, "cuMemRelease", handle)
                at += size
            if end > start:
                call(self._driver, "cuMemSetAccess", self.address + start, end - start, [self._access], 1)
        except RuntimeError:
            if at > start:
                call(self._driver, "cuMemUnmap", self.address + start, at - start)
            raise


def _free(driver: Any, context: Any, address: int, size: int, mapped: list[int]) -> None:
    """The memory of a range, then its address; on whichever thread collects the garbage."""
    head, tail = mapped
    call(driver, "cuCtxPushCurrent", context)
    try:
        call(driver, "cuCtxSynchronize")  # kernels may still run
        for start, end in ((0, head), (tail, size)):
            if start < end:
                call(driver, "cuMemUnmap", address + start, end - start)
        call(driver, "cuMemAddressFree", address, size)
    finally:
        call(driver, "cuCtxPopCurrent")


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """A function of the driver: its result; RuntimeError, in one line, if it fails."""
    status, *values = getattr(driver, name)(*arguments)
    if int(status):
        text = driver.cuGetErrorString(status)[1]
        raise RuntimeError(f"{name} failed: {text.decode() if isinstance(text, bytes) else text} ({int(status)})")
    return values[0] if values else None
