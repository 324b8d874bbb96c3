"""From a model's name to a module with its weights in place.

Owns finding the checkpoint, reading safetensors (nothing else: a pickle can run code) and the strict match
between a family's `WEIGHTS` and the tensors found. Every error is one line that names the file, the tensor or
the value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flover.config import ModelConfig, read_json
from flover.kernels.dispatch import load_backend
from flover.layers.base import Layer
from flover.layers.linear import Linear
from flover.layers.norm import LayerNorm, RMSNorm
from flover.models.base import CausalLM, Source
from flover.models.registry import model_class

BUILTIN = ("kjv-gpt2", "kjv-llama")
HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "merges.txt", "vocab.txt", "*.jinja")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATING = ("F64", "F32", "F16", "BF16")
NOT_READ = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def resolve_model(model: str) -> Path:
    """The folder of a built-in model, of a local checkpoint, or of a hub repository (downloaded once).

    Raises:
        ValueError: nothing of that name can be had; says what would work.
    """
    if model in BUILTIN:
        folder = Path(__file__).parents[1] / "builtin" / model
        if not folder.is_dir():
            raise ValueError(f"the built-in model {model} is not part of this installation ({folder} is missing)")
        return folder
    local = Path(model).expanduser()
    if model and local.is_dir():
        return local
    wanted = f"a folder, a built-in model ({', '.join(BUILTIN)}) or a Hugging Face id such as 'org/name'"
    if local.is_file():
        raise ValueError(f"model {model!r} is a file; give its folder: {wanted}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model, re.ASCII):
        raise ValueError(f"model {model!r} does not exist; give {wanted}")
    return _download(model, wanted)


def _download(model: str, wanted: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))
    except Exception as error:  # the hub client raises errors of its own, of httpx and of the file system
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model {model!r} is no folder and cannot be had from the Hugging Face hub"
            f" ({type(error).__name__}: {reason}); give {wanted}, or download it where there is a network"
        ) from None


def load_model(
    folder: Path | str,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    batch_invariant: bool = False,
    load_format: str = "auto",
    seed: int = 0,
    backend: str = "torch",
    quantization: str = "none",
) -> nn.Module:
    """The family's module on `device` in `dtype`, in eval mode, nothing requiring a gradient.

    Args:
        folder: of the checkpoint; not read when load_format is "dummy".
        batch_invariant: fixed shapes for matrix products and activations (DESIGN section 4, statement b).
        load_format: "auto" reads the checkpoint, "dummy" draws weights from `seed` (for benchmarks).
        backend: whose functions the layers call (`kernels.dispatch`).
        quantization: of the blocks' linear layers, as in `EngineConfig`; each is quantised as it arrives.

    Raises:
        ValueError: an unknown architecture or setting; a checkpoint that does not match the model exactly.
    """
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"load_format must be 'auto' or 'dummy', got {load_format!r}")
    family, module = model_class(config.architecture), _skeleton(config, folder, quantization)
    parameters = _parameters(module)
    if load_format == "dummy":
        _fill_dummy(parameters, dtype, device, seed)
    else:
        with ExitStack() as stack:
            checkpoint = _Checkpoint(Path(folder), stack)
            _fill(parameters, checkpoint, family, config, dtype, device)
    ops = load_backend(backend)
    for part in module.modules():
        if isinstance(part, Layer):
            part.ops, part.batch_invariant = ops, batch_invariant
    return module.to(device).eval()  # moves the buffers: rope frequencies, ALiBi slopes


def weight_bytes(folder: Path | str, config: ModelConfig, dtype: torch.dtype, quantization: str = "none") -> int:
    """Bytes that the weights take once loaded; tied ones count once. All layers are alike, so two are looked at."""
    one, two = (
        sum(p.num_bytes(dtype) for p in _parameters(_skeleton(replace(config, num_layers=n), folder, quantization)))
        for n in (1, 2)
    )
    return one + (config.num_layers - 1) * (two - one)


def _skeleton(config: ModelConfig, folder: Path | str, quantization: str) -> nn.Module:
    """The family's module without any memory behind its parameters."""
    try:
        with torch.device("meta"):
            module = model_class(config.architecture)(config)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"config.json of {folder} has a value of the wrong type, or lacks one: {error}") from None
    assert isinstance(module, nn.Module)
    for name, part in module.named_modules():
        if isinstance(part, Linear) and name.startswith("layers."):  # not the output head, nor OPT's projections
            part.quantization = quantization
    return module


class _Checkpoint:
    """The tensors of a folder. Refuses what is not plain, complete safetensors inside the folder."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        if not folder.is_dir():
            raise ValueError(f"model folder {folder} does not exist")
        if not any(folder.iterdir()):
            raise ValueError(f"model folder {folder} is empty")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json")
        self.folder = folder
        self.root = folder.resolve()
        self.files: dict[str, Any] = {}
        self.where: dict[str, str] = {}
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
            file = stack.enter_context(safe_open(path, framework="pt"))
            names = list(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.folder / shard} is corrupt: {' '.join(str(error).split())}") from None
        self.files[shard] = file
        for name in names:
            if name in self.where:
                raise ValueError(f"{name} is in both {self.where[name]} and {shard}")
            self.where[name] = shard

    def read(self, name: str) -> Tensor:
        file = self.files[self.where[name]]
        kind = file.get_slice(name).get_dtype()
        if kind not in FLOATING:
            raise ValueError(f"{name} in {self.where[name]} is {kind}: quantised checkpoints are not supported")
        tensor: Tensor = file.get_tensor(name)
        return tensor


class _Parameter:
    """A parameter and all the places that hold it (tied weights have two); `name` is the first."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.shape = name, parameter.shape
        self.places: list[tuple[nn.Module, str]] = []

    def set(self, tensor: Tensor) -> None:
        if layer := self._quantised():
            return layer.quantise(tensor)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for owner, attribute in self.places:
            setattr(owner, attribute, parameter)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes once loaded: a quantised weight has a byte per element, and a scale per row."""
        return self.shape.numel() + 4 * self.shape[0] if self._quantised() else self.shape.numel() * dtype.itemsize

    def _quantised(self) -> Linear | None:
        owner, attribute = self.places[0]
        chosen = attribute == "weight" and isinstance(owner, Linear) and owner.quantization != "none"
        return cast(Linear, owner) if chosen else None


def _parameters(module: nn.Module) -> list[_Parameter]:
    found: dict[int, _Parameter] = {}
    for prefix, owner in module.named_modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            found.setdefault(id(parameter), _Parameter(name, parameter)).places.append((owner, attribute))
    return list(found.values())


def _layered(weights: Mapping[str, str | Source], num_layers: int) -> Iterator[tuple[str, Source]]:
    """The table with `{i}` written out."""
    for name, source in weights.items():
        source = Source((source,)) if isinstance(source, str) else source
        if "{i}" not in name:
            yield name, source
            continue
        for i in range(num_layers):
            names = tuple(n.replace("{i}", str(i)) for n in source.names)
            yield name.replace("{i}", str(i)), Source(names, source.op)


def _fill(
    parameters: list[_Parameter],
    checkpoint: _Checkpoint,
    family: type[CausalLM],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    table = dict(_layered(family.WEIGHTS, config.num_layers))
    known = {name for source in table.values() for name in source.names}
    stored: dict[str, str] = {}  # the table's spelling -> the checkpoint's
    for name in checkpoint.where:
        spelling = family.RENAMED.get(name, name)
        if spelling not in known and not spelling.startswith(family.PREFIX):
            spelling = family.PREFIX + spelling
        stored[spelling] = name
    used: set[str] = set()
    if config.tie_word_embeddings:  # a copy of the embedding, if it is there at all
        used.add("lm_head.weight")
    for parameter in parameters:
        source = table[parameter.name]
        for name in source.names:
            if name not in stored:
                raise ValueError(f"{checkpoint.folder} lacks {name}")
        used.update(source.names)
        raw = [checkpoint.read(stored[name]) for name in source.names]
        try:
            tensor: Tensor | None = source.op(raw, config)
        except (RuntimeError, IndexError):  # shapes that cannot be joined or reordered
            tensor = None
        if tensor is None or tensor.shape != parameter.shape:
            shapes = " + ".join(str(list(t.shape)) for t in raw)
            raise ValueError(
                f"{' + '.join(source.names)} has shape {shapes}, but {parameter.name} needs {list(parameter.shape)}"
            )
        parameter.set(torch.empty(parameter.shape, dtype=dtype, device=device).copy_(tensor))
    for spelling, name in stored.items():
        if spelling not in used and not any(re.fullmatch(pattern, spelling) for pattern in family.IGNORED):
            raise ValueError(f"{name} in {checkpoint.where[name]} has no place in {config.architecture}")


def _fill_dummy(parameters: list[_Parameter], dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
    """Normal 0.02, around 1 for the norms, so that activations keep their scale."""
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in parameters:
        tensor = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        owner, attribute = parameter.places[0]
        if isinstance(owner, (LayerNorm, RMSNorm)) and attribute == "weight":
            tensor += 0.0 if isinstance(owner, RMSNorm) and owner.unit_offset else 1.0
        parameter.set(tensor)
