"""Make the two small models that ship with Flover: ``kjv-llama`` and ``kjv-gpt2``.

Both are base models of the King James text, trained from scratch and stored in Hugging Face form.

    python scripts/train_builtin.py text  --text .data/kjv.txt     # needs Debian's bible-kjv
    python scripts/train_builtin.py train --text .data/kjv.txt --output OUT --minutes 5   # best on a GPU
    python scripts/card_builtin.py OUT/kjv-llama OUT/kjv-gpt2      # README.md and loss.png: needs matplotlib

For each architecture ``train`` runs once per recipe (DROPOUT:WEIGHT_DECAY), keeps the averaged weights with
the lowest validation loss seen in any of these runs, and scores them once on the test chapters, which nothing
else reads.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import random
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
VOCABULARY = 2560
LARGEST_FILE = 7_900_000
NAMES = ("kjv-llama", "kjv-gpt2")
PROMPTS = ("In the beginning", "And the LORD said unto Moses,", "Blessed are", "Now there was a certain man")
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}


def write_text(target: Path) -> None:
    """Write the text as one verse a line, without references, and a blank line between chapters."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapters: dict[str, list[str]] = {}
    for line in dump.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+\d+):\d+ (.+)", line.strip())
        if match is None:
            raise ValueError(f"not a verse: {line!r}")
        chapters.setdefault(match[1], []).append(" ".join(match[2].split()))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n\n".join("\n".join(verses) for verses in chapters.values()) + "\n", encoding="utf-8")
    print(f"{target}: {len(chapters)} chapters, {sum(map(len, chapters.values()))} verses")


def split_chapters(text: str, seed: int, fraction: float = 0.03) -> dict[str, list[str]]:
    """Share the chapters out: a fraction each for validation and test, the rest for training."""
    chapters = text.strip().split("\n\n")
    held = random.Random(seed).sample(range(len(chapters)), 2 * round(fraction * len(chapters)))
    parts = {"validation": set(held[: len(held) // 2]), "test": set(held[len(held) // 2 :])}
    parts["train"] = set(range(len(chapters))) - set(held)
    return {name: [chapters[i] for i in sorted(chosen)] for name, chosen in parts.items()}


def train_tokenizer(chapters: list[str]) -> Any:
    """Train a byte-level BPE tokenizer, which adds nothing to what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], **options)
    tokenizer.train_from_iterator(chapters, trainer)
    return tokenizer


def token_stream(tokenizer: Any, chapters: list[str], device: str) -> Any:
    """Encode the chapters as one tensor, with the end token before, between and after them."""
    end = tokenizer.token_to_id(END)
    ids = (token for encoding in tokenizer.encode_batch(chapters) for token in (*encoding.ids, end))
    return torch.tensor([end, *ids], device=device)


def build_model(name: str, layers: int, dropout: float) -> Any:
    """Build a model with random weights; dropout sits at the same places in both architectures."""
    # No pad_token_id: it would keep the end token's embedding from learning.
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    if name == "kjv-gpt2":
        gpt2 = GPT2Config(
            vocab_size=VOCABULARY, n_positions=512, n_embd=256, n_layer=layers, n_head=8,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **ends,
        )  # fmt: skip
        return GPT2LMHeadModel(gpt2)
    llama = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_dropout=dropout, **ends,
    )  # fmt: skip
    model = LlamaForCausalLM(llama)
    for path, module in model.named_modules():
        if path.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, output: functional.dropout(output, dropout, m.training))
    return model


def mean_loss(model: Any, stream: Any, window: int) -> float:
    """Average the loss over every token of the stream but its first, in windows that do not overlap."""
    last = len(stream) - 1
    full = last // window * window
    total = 0.0
    with torch.no_grad():
        for inputs, targets in ((stream[:full].view(-1, window), stream[1 : full + 1]),
                                (stream[None, full:last], stream[full + 1 :])):  # fmt: skip
            if len(targets):
                logits = model(input_ids=inputs, use_cache=False).logits.float()
                total += functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    return total / last


def make_optimizer(model: Any, rate: float, weight_decay: float) -> Any:
    """AdamW that decays the matrices and leaves the vectors alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=model.device.type == "cuda")


def train_once(
    name: str, recipe: str, streams: dict[str, Any], line_ends: Any, seconds: float,
    arguments: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Train one model with one recipe; return its record and its best averaged weights."""
    dropout, weight_decay = map(float, recipe.split(":"))
    stream, valid = streams["train"], streams["validation"]
    torch.manual_seed(arguments.seed)
    model = build_model(name, arguments.layers, dropout).to(stream.device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, arguments.rate, weight_decay)
    autocast = torch.autocast(stream.device.type, torch.bfloat16, enabled=stream.is_cuda)
    window = model.config.max_position_embeddings
    batch = max(1, arguments.batch_tokens // window)
    limit = len(stream) - window - 1
    starts = torch.isin(stream[:limit], line_ends).nonzero()[:, 0] + 1
    offsets = torch.arange(window + 1, device=stream.device)
    curve: list[dict[str, float]] = []
    best: tuple[float, int, dict[str, Any]] = (math.inf, 0, {})
    losses, begin, step = [], time.monotonic(), 0
    while True:
        progress = max(step / arguments.steps, (time.monotonic() - begin) / seconds)
        if step % arguments.every == 0 or progress >= 1:
            with autocast:
                loss = mean_loss(average, valid, window)
            if losses:
                curve.append({"step": step, "train": torch.stack(losses).mean().item(), "validation": loss})
                losses = []
            if loss < best[0]:
                best = (loss, step, {key: value.clone() for key, value in average.state_dict().items()})
        if progress >= 1:
            break
        rate = min((step + 1) / arguments.warmup, 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * rate
        # Half of the windows start with a verse, as prompts do; the others start anywhere.
        anywhere = torch.randint(limit, (batch - batch // 2,), device=stream.device)
        verses = starts[torch.randint(len(starts), (batch // 2,), device=stream.device)]
        rows = stream[torch.cat((anywhere, verses))[:, None] + offsets]
        with autocast:
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        step_loss = functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(step_loss.detach())
        step += 1
        with torch.no_grad():
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - min(arguments.averaging, step / (step + 9)))
    record = {
        "dropout": dropout, "weight_decay": weight_decay, "steps": step, "windows_per_step": batch,
        "window": window, "epochs": round(step * batch * window / len(stream), 2),
        "best_step": best[1], "validation_loss": best[0], "seconds": round(time.monotonic() - begin, 1),
    }  # fmt: skip
    print(name, record, flush=True)
    return {**record, "curve": curve}, best[2]


def save_model(folder: Path, model: Any, tokenizer: Any) -> int:
    """Write the model's files, weights as bfloat16, and return the size of the weights file."""
    window = model.config.max_position_embeddings
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, **SAMPLING)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "rope_parameters" in config:  # the older place of this setting, which more readers know
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": window,
        "bos_token": END, "eos_token": END, "pad_token": END,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    weights = folder / "model.safetensors"
    weights.chmod(0o644)
    if (size := weights.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{folder.name}: the weights take {size} bytes, more than {LARGEST_FILE}")
    return size


def sample_texts(model: Any, tokenizer: Any, seed: int) -> list[dict[str, str]]:
    """Continue each prompt by 60 tokens, once greedily and once by sampling."""
    torch.manual_seed(seed)
    greedy = {"do_sample": False, "temperature": None, "top_p": None}
    kinds = {"greedy": greedy, "sampled": {**SAMPLING, "top_k": 0}}
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
        entry = {"prompt": prompt}
        for kind, options in kinds.items():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, **options)
            entry[kind] = tokenizer.decode(out[0].tolist())
        texts.append(entry)
    return texts


def train(arguments: argparse.Namespace) -> None:
    """Train both models and write their folders, all but the card and its picture."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    environment = {
        "device": "one " + re.sub(r"^NVIDIA | \d+GB.*", "", accelerator), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    text = arguments.text.read_text(encoding="utf-8")
    parts = split_chapters(text, arguments.seed)
    tokenizer = train_tokenizer(parts["train"])
    streams = {part: token_stream(tokenizer, chapters, device) for part, chapters in parts.items()}
    data = {
        part: {"chapters": len(some), "bytes": len("".join(some).encode()), "tokens": len(streams[part])}
        for part, some in parts.items()
    }
    print(json.dumps(data), flush=True)
    line_ends = torch.tensor([tokenizer.token_to_id(END), *tokenizer.encode("\n").ids], device=device)
    seconds = arguments.minutes * 60 / (len(NAMES) * len(arguments.recipes))
    for name in NAMES:
        runs = [train_once(name, r, streams, line_ends, seconds, arguments) for r in arguments.recipes]
        chosen = min(range(len(runs)), key=lambda index: runs[index][0]["validation_loss"])
        run, weights = runs[chosen]
        model = build_model(name, arguments.layers, run["dropout"])
        model.load_state_dict(weights)
        folder = arguments.output / name
        size = save_model(folder, model, tokenizer)
        model = type(model).from_pretrained(folder, dtype=torch.float32).to(device).eval()
        loss = mean_loss(model, streams["test"], run["window"])
        bits = loss * (len(streams["test"]) - 1) / math.log(2) / data["test"]["bytes"]
        settings = ("seed", "layers", "minutes", "batch_tokens", "rate", "warmup", "averaging")
        record = {
            "name": name, "parameters": model.num_parameters(), "weights_bytes": size,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(), "data": data,
            "vocabulary": tokenizer.get_vocab_size(),
            "test": {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits},
            "settings": {key: getattr(arguments, key) for key in settings}, "environment": environment,
            "chosen_run": chosen, "runs": [run for run, _ in runs],
            "samples": sample_texts(model, tokenizer, arguments.seed),
        }  # fmt: skip
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(name, size, "bytes,", record["test"], json.dumps(record["samples"], indent=1), flush=True)


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description="Make the built-in models (see the top of this file).")
    parser.add_argument("command", choices=("text", "train"), help="write the text, or train both models")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("OUT"), help="folder for the models' folders")
    parser.add_argument("--recipes", nargs="+", default=["0.1:0.3", "0.2:0.3", "0.2:1.0"])
    parser.add_argument("--minutes", type=float, default=5.0, help="limit on all training together")
    parser.add_argument("--steps", type=int, default=2400, help="limit on each run")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1611)
    parser.add_argument("--warmup", type=int, default=100, help="steps until the peak learning rate")
    parser.add_argument("--every", type=int, default=100, help="steps between validations")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--averaging", type=float, default=0.995, help="decay of the average of the weights")
    arguments = parser.parse_args()
    if arguments.command == "text":
        write_text(arguments.text)
    else:
        train(arguments)


if __name__ == "__main__":
    main()
