"""The tensors of a checkpoint folder: where each lies, and reading them to a device at the speed of the page cache.

Only safetensors is read (a pickle can run code), and only what is plain, complete and inside the folder. The library
checks the headers. Threads read the bytes and nothing is mapped, so a file that shrinks meanwhile is an error and no
SIGBUS. On a GPU each thread reads into pinned memory and copies on a stream of its own, which also converts; on a CPU
they read into the tensor itself.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flover.model_config import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NOT_READ = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
PIECE = {"cpu": 8 << 20, "cuda": 16 << 20}  # bytes that a thread reads at a time
THREADS = {"cpu": 4, "cuda": 12}  # at most; one reads 5-8 GB/s from the page cache
IN_FLIGHT = 1 << 30  # bytes of parameters being read, at most; a larger one is read alone


class Stored(NamedTuple):
    """Where a tensor, or a part of one, lies. `stride`: elements from one row to the next; 0: there are no gaps."""

    name: str
    path: Path
    file: int  # descriptor
    offset: int  # of its first byte
    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: int = 0

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def take(self, dim: int, begin: int, end: int) -> Stored:
        """The part `[begin, end)` of dimension 0, or of dimension 1 of a whole matrix."""
        shape = (*self.shape[:dim], end - begin, *self.shape[dim + 1 :])
        if dim == 0:
            first = begin * torch.Size(self.shape[1:]).numel()
            return self._replace(shape=shape, offset=self.offset + first * self.dtype.itemsize)
        width = self.shape[1]
        stride = 0 if end - begin == width else width
        return self._replace(shape=shape, offset=self.offset + begin * self.dtype.itemsize, stride=stride)


class Checkpoint:
    """The tensors of a folder. Refuses what is not plain, complete safetensors inside the folder.

    Args:
        stack: closes the files.

    Raises:
        ValueError: what is wrong, with the file or the tensor.
    """

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        if not folder.is_dir():
            raise ValueError(f"model folder {folder} does not exist")
        if not any(folder.iterdir()):
            raise ValueError(f"model folder {folder} is empty")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json")
        self.folder = folder
        self.root = folder.resolve()
        self.where: dict[str, str] = {}  # tensor -> shard
        self._entries: dict[str, dict[str, Any]] = {}  # tensor -> its part of the header
        self._files: dict[str, tuple[int, int]] = {}  # shard -> descriptor, where its tensors begin
        index = self._index()
        for shard in sorted(set(index.values())) or [SINGLE]:
            self._open(shard, stack)
        for name, shard in index.items():
            if self.where.get(name) != shard:
                raise ValueError(f"{INDEX} says that {shard} holds {name}, but it does not")

    def _index(self) -> dict[str, str]:
        """Tensor -> shard from the index; nothing for a single file."""
        if os.path.lexists(self.folder / SINGLE):
            return {}
        if not os.path.lexists(self.folder / INDEX):
            other = sorted(p.name for p in self.folder.iterdir() if p.suffix in NOT_READ)
            hint = f"; {other[0]} is not read, convert it to safetensors" if other else ""
            raise ValueError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")
        self._inside(INDEX)
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.folder / INDEX} has no weight_map")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
                raise ValueError(f"{INDEX}: {name} lies in {shard!r}, which is no safetensors file of this folder")
        return dict(weight_map)

    def _inside(self, name: str) -> Path:
        """The file's real path, which must lie in the folder, or in the blobs of the same hub cache entry."""
        path = self.folder / name
        real = path.resolve()
        allowed = [self.root]
        if self.root.parent.name == "snapshots":
            allowed.append(self.root.parent.parent / "blobs")
        if not any(real.is_relative_to(place) for place in allowed):
            raise ValueError(f"{path} is a link out of the model folder, to {real}")
        if not real.is_file():
            raise ValueError(f"{self.folder} lacks {name}")
        return real

    def _open(self, shard: str, stack: ExitStack) -> None:
        path = self._inside(shard)
        try:
            with safe_open(path, framework="pt"):  # refuses a header that is not exactly right
                file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            stack.callback(os.close, file)
            size = int.from_bytes(os.pread(file, 8, 0), "little")
            header: dict[str, Any] = json.loads(os.pread(file, size, 8))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.folder / shard} is corrupt: {' '.join(str(error).split())}") from None
        header.pop("__metadata__", None)
        self._files[shard] = file, 8 + size
        for name, entry in header.items():
            if name in self.where:
                raise ValueError(f"{name} is in both {self.where[name]} and {shard}")
            self.where[name], self._entries[name] = shard, entry

    def stored(self, name: str) -> Stored:
        """Where a tensor lies; ValueError if it is none of floating point."""
        shard, entry = self.where[name], self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name} in {shard} is {entry['dtype']}: quantised checkpoints are not supported")
        file, start = self._files[shard]
        first = start + entry["data_offsets"][0]
        return Stored(name, self.folder / shard, file, first, tuple(entry["shape"]), DTYPES[entry["dtype"]])


class Group(NamedTuple):
    """Tensors that make one parameter, with memory on the device.

    `whole` `[numel]` is all their elements, one after another, if one dtype was asked for; `parts` have their shapes.
    """

    whole: Tensor | None
    parts: list[Tensor]
    pieces: list[Future[Any]]  # what is still being read

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def read_groups(
    wanted: Sequence[tuple[Sequence[Stored], torch.dtype | None]], device: torch.device
) -> Generator[Group, None, None]:
    """The tensors of each group on the device, in order.

    What is being read is never more than the largest group, nor more than IN_FLIGHT if it is several. Work that the
    caller enqueues on the current stream comes after the copies.

    Args:
        wanted: the tensors of each group, and the dtype of `Group.whole`; None: parts as they are stored, no whole.

    Raises:
        ValueError: a file that cannot be read, or has become shorter than its header says.
    """

    def nbytes(group: Sequence[Stored], dtype: torch.dtype | None) -> int:
        return sum(one.numel * (dtype or one.dtype).itemsize for one in group)

    limit = min(IN_FLIGHT, max((nbytes(*one) for one in wanted), default=0))
    flying: deque[Group] = deque()
    with ExitStack() as stack:
        reader = _Reader(device, stack)
        for one in wanted:
            while flying and sum(group.nbytes for group in flying) + nbytes(*one) > limit:
                yield reader.finish(flying.popleft())
            flying.append(reader.start(*one))
        while flying:
            yield reader.finish(flying.popleft())


class _Reader:
    """Threads that read pieces of tensors; stopped by `stack`, which then closes what they used."""

    def __init__(self, device: torch.device, stack: ExitStack) -> None:
        self._device, self._piece = device, PIECE[device.type]
        self._lanes, self._lock = threading.local(), threading.Lock()
        num_threads = min(THREADS[device.type], os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="flover-reader")
        self._closing = stack.enter_context(ExitStack())  # of the lanes: after the threads
        if device.type == "cuda":
            self._closing.callback(_free_pinned)
        stack.callback(lambda: self._pool.shutdown(wait=True, cancel_futures=True))
        self._buffer = torch.empty(self._piece, dtype=torch.uint8)

    def start(self, stored: Sequence[Stored], dtype: torch.dtype | None) -> Group:
        """Give memory to a group and queue its pieces."""
        counts = [one.numel for one in stored]
        if dtype is None:
            whole, flat = None, [torch.empty(one.numel, dtype=one.dtype, device=self._device) for one in stored]
        else:
            whole = torch.empty(sum(counts), dtype=dtype, device=self._device)
            flat = list(torch.split(whole, counts))
        ready = None
        if self._device.type == "cuda":  # this memory may be what enqueued work still reads
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self._device))
        pieces: list[Future[Any]] = []
        for one, target in zip(stored, flat):
            length = self._piece // one.dtype.itemsize
            parts = [(one, at, target[at : at + length]) for at in range(0, one.numel, length)]
            if ready is not None:
                pieces += [self._pool.submit(self._copy, *part, ready) for part in parts]
            elif one.dtype == target.dtype:
                pieces += [self._pool.submit(_read, *part) for part in parts]
            else:
                self._convert(parts)
        return Group(whole, [target.view(one.shape) for one, target in zip(stored, flat)], pieces)

    def finish(self, group: Group) -> Group:
        """Wait for a group, as far as work on the current stream needs it."""
        for piece in group.pieces:
            copied = piece.result()
            if copied is not None:
                torch.cuda.current_stream(self._device).wait_event(copied)
        return group

    def _convert(self, parts: Sequence[tuple[Stored, int, Tensor]]) -> None:
        """On a CPU, by the caller: conversion is what takes long, and uses every core."""
        for one, at, target in parts:
            buffer = self._buffer.view(one.dtype)[: len(target)]
            _read(one, at, buffer)
            target.copy_(buffer)

    def _copy(self, stored: Stored, at: int, target: Tensor, ready: Any) -> Any:
        """On a thread, to a GPU: one piece; -> the event of its copy."""
        lane: _Lane | None = getattr(self._lanes, "lane", None)
        if lane is None:
            lane = self._lanes.lane = _Lane(self._device, self._piece)
            with self._lock:
                self._closing.callback(lane.close)
        return lane.copy(stored, at, target, ready)


class _Lane:
    """A thread's way to GPU memory: a stream, and two pinned buffers, one read into while the other is copied."""

    def __init__(self, device: torch.device, size: int) -> None:
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def copy(self, stored: Stored, at: int, target: Tensor, ready: Any) -> Any:
        turn = self._turn = 1 - self._turn
        if self._copied[turn] is not None:
            self._copied[turn].synchronize()
        buffer = self._buffers[turn].view(stored.dtype)[: len(target)]
        _read(stored, at, buffer)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            target.copy_(buffer, non_blocking=True)  # converts on the GPU
            copied = self._copied[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        return copied

    def close(self) -> None:
        self._stream.synchronize()
        self._buffers.clear()


def _free_pinned() -> None:
    """Give pinned memory back that torch would keep for later, if this version of it can."""
    getattr(torch._C, "_host_emptyCache", lambda: None)()


def _read(stored: Stored, at: int, target: Tensor) -> None:
    """Elements `[at, at + n)` of a tensor into `target` `[n]` of its dtype, in main memory.

    Raises:
        ValueError: the file ends early or cannot be read.
    """
    data: Any = target.view(torch.uint8).numpy()
    view, size = memoryview(data), stored.dtype.itemsize
    if not stored.stride:
        return _read_bytes(stored, stored.offset + at * size, view)
    width, done = stored.shape[1] * size, 0
    while done < len(view):
        row, start = divmod(at * size + done, width)
        count = min(width - start, len(view) - done)
        _read_bytes(stored, stored.offset + row * stored.stride * size + start, view[done : done + count])
        done += count


def _read_bytes(stored: Stored, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(stored.file, [view[done:]], offset + done)
        except OSError as error:
            raise ValueError(f"{stored.path} cannot be read: {error.strerror}") from None
        if not count:
            raise ValueError(f"{stored.path} became shorter while it was read: {stored.name} is cut off")
        done += count
