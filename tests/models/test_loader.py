"""The loader: what it accepts, and one test per way a checkpoint can be wrong. Every error is one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from parity import Checkpoint, Driver, random_prompts
from safetensors.torch import load_file, save_file

from flover.model_config import ModelConfig
from flover.models import checkpoint as reading
from flover.models.checkpoint import Checkpoint as StoredCheckpoint
from flover.models.loader import load_model, resolve_model
from flover.models.registry import model_class

Get = Callable[[str], Checkpoint]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(checkpoint: Get, tmp_path: Path) -> Path:
    """A copy of a good checkpoint in one file."""
    return Path(shutil.copytree(checkpoint("llama-gqa").folder, tmp_path / "model"))


@pytest.fixture
def sharded(checkpoint: Get, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(checkpoint("llama-sharded").folder, tmp_path / "model"))
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def refuses(folder: Path, *says: str, config: ModelConfig | None = None, **options: Any) -> None:
    config = config or ModelConfig.from_folder(folder)
    with pytest.raises(ValueError, match=".") as caught:
        load_model(folder, config, dtype=torch.float32, device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    for text in says:
        assert text in message, message


def test_missing_and_empty_folder(folder: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_folder(folder)
    refuses(tmp_path / "nowhere", "nowhere does not exist", config=config)
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "is empty", config=config)


def test_no_config(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    (folder / "config.json").unlink()
    refuses(folder, "has no config.json", config=config)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(folder: Path, keep: int) -> None:
    file = folder / SINGLE
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    refuses(folder, "model.safetensors is corrupt")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 0])
def test_header_length_that_cannot_be(folder: Path, length: int) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(struct.pack("<Q", length) + data[8:])
    refuses(folder, "model.safetensors is corrupt")


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**62]}},
        {"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
    ],
    ids=["overlap", "backwards", "overflow", "beyond the end", "unknown dtype"],
)
def test_impossible_headers(folder: Path, entries: dict[str, Any]) -> None:
    (folder / SINGLE).write_bytes(header(**entries) + bytes(16))
    refuses(folder, "model.safetensors is corrupt")


def test_header_that_is_not_json(folder: Path) -> None:
    (folder / SINGLE).write_bytes(struct.pack("<Q", 8) + b"{{{{{{{{" + bytes(64))
    refuses(folder, "model.safetensors is corrupt")


def test_wrong_shape(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.norm.weight": torch.ones(47)}))
    refuses(folder, "model.norm.weight", "[47]", "[48]")


def test_wrong_shape_of_one_joined_part(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(folder, lambda t: t.update({name: torch.ones(40, 47)}))
    refuses(folder, name, "[40, 47]", "[160, 48]")


def test_wrong_shape_of_interleaved_qkv(checkpoint: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("neox").folder, tmp_path / "model"))
    edit(folder, lambda t: t.update({"gpt_neox.layers.0.attention.query_key_value.weight": torch.ones(143, 48)}))
    refuses(folder, "query_key_value.weight", "[143, 48]", "[144, 48]")


def test_missing_tensor(folder: Path) -> None:
    edit(folder, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    refuses(folder, "lacks model.layers.2.mlp.up_proj.weight")


def test_missing_head_when_untied(folder: Path) -> None:
    edit(folder, lambda t: t.pop("lm_head.weight"))
    refuses(folder, "lacks lm_head.weight")


def test_surplus_tensor(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(80)}))
    refuses(folder, "model.layers.0.self_attn.q_proj.bias", "no place in LlamaForCausalLM")


def test_surplus_layer(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.3.input_layernorm.weight": torch.ones(48)}))
    refuses(folder, "model.layers.3.input_layernorm.weight", "no place")


def test_ignored_buffers_and_bare_names(checkpoint: Get, tmp_path: Path) -> None:
    """The original gpt2 checkpoint: no `transformer.` prefix, causal masks as tensors (uint8), a copy of the head."""
    source = checkpoint("gpt2")
    folder = Path(shutil.copytree(source.folder, tmp_path / "model"))

    def bare(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    edit(folder, bare)
    config = ModelConfig.from_folder(folder)
    module = load_model(folder, config, dtype=torch.float32, device="cpu")
    prompts = random_prompts(101, [9])
    ours = Driver(module, config, prompts, "slab").prefill()[0]
    assert (ours - source.hf_logits(prompts[0])).abs().max() < 1e-3


def test_missing_shard(sharded: Path) -> None:
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    refuses(sharded, f"lacks {gone.name}")


def test_index_that_lies(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, last = sorted(set(index["weight_map"].values()))[:: len(set(index["weight_map"].values())) - 1]
    name = next(n for n, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = last
    (sharded / INDEX).write_text(json.dumps(index))
    refuses(sharded, name, last, "but it does not")


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/model.safetensors", "sub/x.safetensors", "..", 7]
)
def test_index_that_points_elsewhere(sharded: Path, shard: Any) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    refuses(sharded, "model.norm.weight", repr(shard))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_malformed_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    refuses(sharded, INDEX)


def test_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / SINGLE, tmp_path / "secret.safetensors")
    (folder / SINGLE).symlink_to("../secret.safetensors")
    refuses(folder, "is a link out of the model folder", "secret.safetensors")


def test_broken_link(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("nothing.safetensors")
    refuses(folder, SINGLE)


def test_hub_cache_links_are_followed(checkpoint: Get, tmp_path: Path) -> None:
    source = checkpoint("llama-gqa")
    entry = tmp_path / "models--org--name"
    snapshot = entry / "snapshots" / "0123abcd"
    (entry / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(source.folder.iterdir())):
        shutil.copy(file, entry / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    load_model(snapshot, ModelConfig.from_folder(snapshot), dtype=torch.float32, device="cpu")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../../other.safetensors")
    refuses(snapshot, "is a link out of the model folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model-q4.gguf"])
def test_other_formats_are_named(folder: Path, name: str) -> None:
    (folder / SINGLE).rename(folder / name)
    refuses(folder, SINGLE, name)


def test_quantised_tensor(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit(folder, lambda t: t.update({name: torch.ones(48, 56, dtype=torch.int8)}))
    refuses(folder, name, "I8", "quantised")


def test_fp8_tensor(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit(folder, lambda t: t.update({name: torch.ones(48, 56).to(torch.float8_e4m3fn)}))
    refuses(folder, name, "F8_E4M3")


def test_unknown_settings(folder: Path) -> None:
    refuses(folder, "load_format", "'pickle'", load_format="pickle")
    with pytest.raises(ValueError, match=r"unknown architecture 'MambaForCausalLM'; known: .*LlamaForCausalLM"):
        model_class("MambaForCausalLM")


@pytest.mark.parametrize(
    ("case", "changes", "says"),
    [
        ("llama-gqa", {"hidden_act": "xielu"}, "unknown activation 'xielu'; known: gelu"),
        (
            "llama-gqa",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "'yarn' is not supported; known: default",
        ),
        ("llama-gqa", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        (
            "llama-gqa",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ("llama-gqa", {"intermediate_size": None}, "intermediate_size"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gptj", {"rotary_dim": 14}, "rotary_dim 14"),
        ("gptj", {"rotary_dim": 3}, "got 3"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_settings_a_family_cannot_do(checkpoint: Get, case: str, changes: dict[str, Any], says: str) -> None:
    ckpt = checkpoint(case)
    hf = {**ckpt.config.hf, **changes}
    refuses(ckpt.folder, says, config=ModelConfig.from_dict(hf))


def test_old_style_config(checkpoint: Get) -> None:
    """rope_theta, rotary_pct and torch_dtype as transformers 4 wrote them; layer kinds left out."""
    ckpt = checkpoint("neox")
    hf = {k: v for k, v in ckpt.config.hf.items() if k not in ("rope_parameters", "dtype")}
    config = ModelConfig.from_dict({**hf, "rotary_pct": 0.34, "rotary_emb_base": 10000, "torch_dtype": "float16"})
    assert config.dtype == "float16"
    module = load_model(ckpt.folder, config, dtype=torch.float32, device="cpu")
    prompts = random_prompts(101, [9])
    ours = Driver(module, config, prompts, "slab").prefill()[0]
    assert (ours - ckpt.hf_logits(prompts[0])).abs().max() < 1e-3
    gemma = {k: v for k, v in checkpoint("gemma2").config.hf.items() if k != "layer_types"}
    assert [ModelConfig.from_dict(gemma).sliding_window(i) for i in range(4)] == [6, None, 6, None]
    qwen = {**checkpoint("qwen2").config.hf, "sliding_window": 9}
    del qwen["use_sliding_window"], qwen["layer_types"]
    assert ModelConfig.from_dict(qwen).sliding_window(30) is None


def test_module_is_ready_to_serve(checkpoint: Get) -> None:
    """Nothing left on meta, no gradients, eval mode, tied weights shared, buffers in fp32."""
    module = checkpoint("llama-bf16").load(dtype=torch.bfloat16, batch_invariant=True)
    assert not module.training
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        assert tensor.device.type == "cpu", name
        assert not tensor.requires_grad, name
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in module.buffers()} == {torch.float32}
    assert module.lm_head.weight is module.embed.weight  # type: ignore[union-attr]
    assert all(m.batch_invariant for m in module.modules() if hasattr(m, "batch_invariant"))


def test_pieces_joins_and_conversions(checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in pieces that end inside a tensor, a few bytes in flight: the same bits, in every family's way to join."""
    for case in ("llama-gqa", "gpt2", "neox"):
        for dtype in (torch.float32, torch.bfloat16):
            monkeypatch.undo()
            want = checkpoint(case).load(dtype=dtype).state_dict()
            monkeypatch.setitem(reading.PIECE, "cpu", 1000)
            monkeypatch.setattr(reading, "IN_FLIGHT", 5000)
            got = checkpoint(case).load(dtype=dtype).state_dict()
            assert list(got) == list(want)
            assert all(torch.equal(got[name], want[name]) for name in want)
    source = load_file(checkpoint("llama-gqa").folder / SINGLE)
    joined = torch.cat([source[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert any(torch.equal(p, joined) for p in checkpoint("llama-gqa").load().parameters())


def test_parts_of_different_types(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    want = load_model(folder, config, dtype=torch.float64, device="cpu")
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(folder, lambda t: t.update({name: t[name].double()}))
    got = load_model(folder, config, dtype=torch.float64, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters()))


def test_bytes_in_flight_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than the largest group, and the caller's, whatever the order."""
    with ExitStack() as stack:
        found = StoredCheckpoint(folder, stack)
        groups = [[found.stored(name)] for name in found.where]
        largest = max(group[0].numel for group in groups) * 4
        started, start = [0], reading._Reader.start

        def watch(self: Any, stored: Any, dtype: Any) -> Any:
            started[0] += stored[0].numel * 4
            return start(self, stored, dtype)

        monkeypatch.setattr(reading._Reader, "start", watch)
        done = 0
        wanted = [(group, None) for group in groups]
        for (stored,), group in zip(groups, reading.read_groups(wanted, torch.device("cpu"))):
            done += group.nbytes
            assert started[0] - done <= largest
            assert torch.equal(group.parts[0], load_file(folder / SINGLE)[stored.name])


def test_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = reading._Reader.start

    def shrink(self: Any, stored: Any, dtype: Any) -> Any:
        os.truncate(folder / SINGLE, 20000)
        return start(self, stored, dtype)

    monkeypatch.setattr(reading._Reader, "start", shrink)
    refuses(folder, "model.safetensors became shorter while it was read")


def test_disk_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    refuses(folder, "model.safetensors cannot be read: Input/output error")


def test_dummy_weights(checkpoint: Get, tmp_path: Path) -> None:
    config = checkpoint("gemma2").config
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "load_format": "dummy"}
    one, two, other = (load_model(tmp_path / "no", config, seed=s, **options) for s in (3, 3, 4))
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
    logits = Driver(one, config, [[1, 2, 3]], "slab").prefill()[0]
    assert torch.isfinite(logits).all()


def test_resolve_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(folder)) == folder
    for bad in (str(folder / "config.json"), "./nowhere", "/no/such/folder", "a/b/c", "", "-x", "org/../name"):
        with pytest.raises(ValueError, match="built-in model") as caught:
            resolve_model(bad)
        assert "\n" not in str(caught.value)
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/name") == folder
    assert asked["repo"] == "org/name"
    assert not any(
        pattern.endswith((".bin", ".pt", "*.py", "*")) and pattern != "tokenizer*"
        for pattern in asked["allow_patterns"]
    )

    def offline(repo: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find\nthe files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'org/name' is no folder and cannot be had .*LocalEntryNotFound") as caught:
        resolve_model("org/name")
    assert "\n" not in str(caught.value)
