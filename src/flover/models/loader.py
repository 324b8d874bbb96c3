"""From a model's name to a module with its weights in place.

Owns finding the checkpoint and the strict match between a family's `WEIGHTS` and the tensors found, which is complete
before a weight is read. Every error is one line that names the file, the tensor or the value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from flover.kernels.dispatch import load_backend
from flover.layers.base import Layer
from flover.layers.embedding import Embedding
from flover.layers.linear import Linear
from flover.layers.norm import LayerNorm, RMSNorm
from flover.model_config import ModelConfig
from flover.models.base import CausalLM, Source, concatenate
from flover.models.checkpoint import Checkpoint, Stored, read_groups
from flover.models.registry import model_class
from flover.models.stages import cut
from flover.parallel import ALONE, Group
from flover.sharding import Part

BUILTIN = ("kjv-gpt2", "kjv-llama")
HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "merges.txt", "vocab.txt", "*.jinja")


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
    group: Group = ALONE,
) -> CausalLM:
    """The family's module on `device` in `dtype`, in eval mode, nothing requiring a gradient.

    Args:
        folder: of the checkpoint; not read when load_format is "dummy".
        batch_invariant: fixed shapes for matrix products and activations (docs/architecture.md, statement b).
        load_format: "auto" reads the checkpoint, "dummy" draws weights from `seed` (for benchmarks).
        backend: whose functions the layers call (`kernels.dispatch`).
        quantization: of the blocks' linear layers, as in `EngineConfig`; each is quantised as it arrives.
        group: the ranks that compute it; only this one's part is read.

    Raises:
        ValueError: an unknown architecture or setting; a checkpoint that does not match the model exactly.
    """
    if load_format not in ("auto", "dummy"):
        raise ValueError(f"load_format must be 'auto' or 'dummy', got {load_format!r}")
    family, module = model_class(config.architecture), _skeleton(config, folder, quantization)
    parameters = _shard(module, group, dtype)
    if load_format == "dummy":
        _fill_dummy(parameters, dtype, device, seed)
    else:
        with ExitStack() as stack:
            wanted = _match(parameters, Checkpoint(Path(folder), stack), family, config)
            _fill(wanted, config, dtype, torch.device(device))
    ops = load_backend(backend)
    for part in module.modules():
        if isinstance(part, Layer):
            part.ops, part.batch_invariant = ops, batch_invariant
    return module.to(device).eval()  # moves the buffers: rope frequencies, ALiBi slopes


def weight_bytes(
    folder: Path | str, config: ModelConfig, dtype: torch.dtype, quantization: str = "none", group: Group = ALONE
) -> int:
    """Bytes that a rank's weights take once loaded; tied ones count once. Layers are alike, so two are looked at."""

    def of(num_layers: int) -> int:
        module = _skeleton(replace(config, num_layers=num_layers), folder, quantization)
        return sum(parameter.num_bytes(dtype) for parameter in _shard(module, group, dtype))

    return of(1) + (config.num_layers - 1) * (of(2) - of(1))


def weight_parts(
    folder: Path | str, config: ModelConfig, dtype: torch.dtype, quantization: str = "none"
) -> dict[str, tuple[int, int]]:
    """(bytes once loaded, parameters) of one "layer", of the "head" that each step reads, of the "embedding" tables.

    Where embedding and head are one tensor it is the head's.
    """

    def parts(num_layers: int) -> dict[str, tuple[int, int]]:
        module = _skeleton(replace(config, num_layers=num_layers), folder, quantization)
        found = {"head": (0, 0), "embedding": (0, 0)}
        for parameter in _parameters(module):
            read = any(not isinstance(owner, Embedding) for owner, _ in parameter.places)
            name = "head" if read else "embedding"
            size, count = found[name]
            found[name] = (size + parameter.num_bytes(dtype), count + parameter.shape.numel())
        return found

    one, two = parts(1), parts(2)
    layer = (two["head"][0] - one["head"][0], two["head"][1] - one["head"][1])
    head = (one["head"][0] - layer[0], one["head"][1] - layer[1])
    return {"layer": layer, "head": head, "embedding": one["embedding"]}


def _skeleton(config: ModelConfig, folder: Path | str, quantization: str) -> CausalLM:
    """The family's module without any memory behind its parameters."""
    try:
        with torch.device("meta"):
            module = model_class(config.architecture)(config)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"config.json of {folder} has a value of the wrong type, or lacks one: {error}") from None
    for name, part in module.named_modules():
        if isinstance(part, Linear) and name.startswith("layers."):  # not the output head, nor OPT's projections
            part.quantization = quantization
    return module


class _Parameter:
    """A parameter and all the places that hold it (tied weights have two); `name` is the first.

    part: what this rank holds of the whole, None: all of it.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.whole = name, parameter.shape
        self.places: list[tuple[nn.Module, str]] = []
        self.part: Part | None = None

    @property
    def shape(self) -> torch.Size:
        """Of what this rank holds."""
        if self.part is None:
            return self.whole
        dim = self.part.dim
        return torch.Size((*self.whole[:dim], self.part.size, *self.whole[dim + 1 :]))

    def narrowed(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole."""
        if self.part is None:
            return whole
        return self.padded(
            torch.cat([whole.narrow(self.part.dim, a, b - a) for a, b in self.part.ranges], self.part.dim)
        )

    def padded(self, tensor: Tensor) -> Tensor:
        """What was read, in this rank's shape: zeros for what no checkpoint has."""
        if self.part is None or not self.part.padding:
            return tensor.view(self.shape)
        out = tensor.new_zeros(self.shape)
        out.view(-1)[: tensor.numel()] = tensor.flatten()  # only the vocabulary is padded, by rows
        return out

    def set(self, tensor: Tensor) -> None:
        if layer := self._quantised():
            return layer.quantise(tensor)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for owner, attribute in self.places:
            setattr(owner, attribute, parameter)

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes once loaded: a quantised weight has a byte per element, and a scale per row."""
        shape = self.shape
        return shape.numel() + 4 * shape[0] if self._quantised() else shape.numel() * dtype.itemsize

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


def _shard(module: nn.Module, group: Group, dtype: torch.dtype) -> list[_Parameter]:
    """Give every layer its part; -> the whole model's parameters, those of other stages without a place."""
    parameters = _parameters(module)
    if group.pipe.stages > 1:
        cut(module, group.pipe, dtype)
        held = {(owner, name) for owner in module.modules() for name, _ in owner.named_parameters(recurse=False)}
        for parameter in parameters:
            parameter.places = [place for place in parameter.places if place in held]
    if group.size > 1:
        parts: dict[tuple[nn.Module, str], Part] = {}
        for layer in module.modules():
            if isinstance(layer, Layer):
                parts.update({(layer, name): part for name, part in layer.shard(group).items()})
        for parameter in parameters:
            parameter.part = parts.get(parameter.places[0]) if parameter.places else None
    return parameters


def _layered(weights: Mapping[str, str | Source], num_layers: int) -> Iterator[tuple[str, Source]]:
    """The table with `{i}` written out."""
    for name, source in weights.items():
        source = Source((source,)) if isinstance(source, str) else source
        if "{i}" not in name:
            yield name, source
            continue
        for i in range(num_layers):
            names = tuple(n.replace("{i}", str(i)) for n in source.names)
            yield name.replace("{i}", str(i)), replace(source, names=names)


class _Wanted(NamedTuple):
    """A parameter and what it is made of."""

    parameter: _Parameter
    source: Source
    stored: list[Stored]


def _match(
    parameters: list[_Parameter], checkpoint: Checkpoint, family: type[CausalLM], config: ModelConfig
) -> list[_Wanted]:
    """What each parameter is made of; refuses a checkpoint that lacks a tensor, has one too many or a wrong shape."""
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
    wanted = []
    for parameter in parameters:
        source = table[parameter.name]
        for name in source.names:
            if name not in stored:
                raise ValueError(f"{checkpoint.folder} lacks {name}")
        used.update(source.names)
        parts = [checkpoint.stored(stored[name]) for name in source.names]
        if _shape(source, parts, config) != parameter.whole:
            shapes = " + ".join(str(list(part.shape)) for part in parts)
            raise ValueError(
                f"{' + '.join(source.names)} has shape {shapes}, but {parameter.name} needs {list(parameter.whole)}"
            )
        if not parameter.places:
            continue
        if parameter.part is not None:
            parts = source.parts(parameter.part, parts)
        wanted.append(_Wanted(parameter, source, parts))
    for spelling, name in stored.items():
        if spelling not in used and not any(re.fullmatch(pattern, spelling) for pattern in family.IGNORED):
            raise ValueError(f"{name} in {checkpoint.where[name]} has no place in {config.architecture}")
    return wanted


def _shape(source: Source, parts: list[Stored], config: ModelConfig) -> tuple[int, ...] | None:
    """The shape of what `source` makes of tensors of these shapes; None if they cannot be joined or reordered."""
    if source.op is concatenate:  # `cat` of meta tensors imports for a second
        rest = {part.shape[1:] for part in parts}
        if len(rest) > 1 or not all(part.shape for part in parts):
            return None
        return sum(part.shape[0] for part in parts), *rest.pop()
    try:
        return source.op([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts], config).shape
    except (RuntimeError, IndexError):
        return None


def _fill(wanted: list[_Wanted], config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Read, join, convert and place the parameters, in order; few are in flight at a time.

    What is only joined and converted is read into the memory in which it stays.
    """
    requests = [(stored, dtype if source.op is concatenate else None) for _, source, stored in wanted]
    with closing(read_groups(requests, device)) as groups:
        for parameter, source, _ in wanted:
            group = next(groups)
            tensor = group.whole
            if tensor is None:
                made = source.op(group.parts, config)
                tensor = torch.empty(made.shape, dtype=dtype, device=device).copy_(made)
            parameter.set(parameter.padded(tensor))
            del group, tensor  # what it was made of goes before more is read
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what conversions took is free for the KV cache


def _fill_dummy(parameters: list[_Parameter], dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
    """Normal 0.02, around 1 for the norms, so that activations keep their scale."""
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in parameters:
        whole = torch.empty(parameter.whole, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        tensor = parameter.narrowed(whole)  # the same weights at any number of ranks
        if not parameter.places:
            continue
        owner, attribute = parameter.places[0]
        if isinstance(owner, (LayerNorm, RMSNorm)) and attribute == "weight":
            tensor += 0.0 if isinstance(owner, RMSNorm) and owner.unit_offset else 1.0
        parameter.set(tensor)
