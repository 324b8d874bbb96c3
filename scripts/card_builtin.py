"""Write the card of each built-in model, from what ``scripts/train_builtin.py train`` recorded.

    python scripts/card_builtin.py OUT/kjv-llama OUT/kjv-gpt2      # needs matplotlib

In each folder it reads ``training.json`` and ``config.json``, and writes ``README.md`` and ``loss.png``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

CARD = """# {name}

A small base model of the English of the King James Bible, made for Flover's examples and tests. It continues
text; it was never taught to answer. `scripts/train_builtin.py` made it, and `training.json` records how.

- Licence: the weights are under the project's Apache-2.0 licence. The text is in the public domain outside
  the United Kingdom. Debian's copyright file words it so: "The copyright for the King James Version text of
  the Bible is expired since the translation was done in 1611 under King James the first of Great Britain."
  In the United Kingdom, which that file does not single out, the Crown's letters patent still cover printing.
- Architecture: {architecture}, {layers} layers, width 256, {heads},
  context {window} tokens, tied embeddings, {parameters:,} parameters; {weights_bytes:,} bytes as bfloat16.
- Text: the King James Version as packed in Debian's `bible-kjv-text`, one verse a line, no verse numbers.
- Documents are chapters, with `<|endoftext|>` between them, shared out by a seeded choice. The validation
  chapters chose the stopping point and the recipe; the test chapters were scored once, at the end.

| part | chapters | bytes | tokens |
| --- | ---: | ---: | ---: |
{rows}

- Tokenizer: byte-level BPE, {vocabulary:,} tokens, trained on the training chapters. It adds no token and no
  space to a prompt. `<|endoftext|>` (id 0) is the start, end and padding token. The chat template only joins
  the messages, each ended by a newline, because this is a base model.
- Training: AdamW (peak rate {rate}, betas 0.9 and 0.98), {warmup} warm-up steps, then a cosine to 1 % of it;
  {windows_per_step} windows of {window} tokens a step, {steps:,} steps ({epochs} epochs, {seconds} s),
  dropout {dropout}, weight decay {weight_decay}, gradients cut at norm 1, exponential average of the weights
  ({averaging}). Kept: the average at step {best_step:,}, with the lowest validation loss of {tried} recipes.
  A run may end by the clock, and its learning rate then follows the clock, so a rerun may differ.
- Environment: {device}, Python {python}, torch {torch}, transformers {transformers}.

## Held-out result

On the test chapters, with the stored weights in float32 arithmetic and windows of {window} tokens that do
not overlap: **perplexity {perplexity:.2f}** a token, or {bits_per_byte:.3f} bits a byte (the figure to
compare with models that have another tokenizer).

![Loss of the kept run](loss.png)

The training line includes dropout, and the validation line is the averaged weights': not like for like.

## Samples

Not chosen: 60 tokens for each prompt, greedy and with the sampling defaults of `generation_config.json`.

{samples}

## Limits

It knows one book in early modern English and nothing else: no facts, no instructions, no other language. It
may repeat passages word for word, join them into sentences that the book does not hold, make up words, and
loop when decoded greedily; do not quote its output as scripture. The book repeats itself in places (Kings and
Chronicles, the Gospels), so the test chapters are not wholly unlike the training chapters.
"""


def draw_losses(target: Path, name: str, run: dict[str, Any]) -> None:
    """Draw the losses of the kept run."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for key in ("train", "validation"):
        axes.plot(*zip(*((point["step"], point[key]) for point in run["curve"]), strict=True), label=key)
    axes.axvline(run["best_step"], color="grey", linestyle=":", label="kept")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=name)
    axes.legend()
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


def write_card(folder: Path) -> None:
    """Draw loss.png and write README.md."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    run = record["runs"][record["chosen_run"]]
    draw_losses(folder / "loss.png", record["name"], run)
    rows = [
        f"| {part} | " + " | ".join(f"{n:,}" for n in counts.values()) + " |" for part, counts in record["data"].items()
    ]
    quotes = []
    for sample in record["samples"]:
        for kind in ("greedy", "sampled"):
            quote = "\n".join(f"    {line}".rstrip() for line in sample[kind].splitlines())
            quotes.append(f"From `{sample['prompt']}`, {kind}:\n\n{quote}")
    values = {**record, **record["settings"], **record["test"], **record["environment"], **run}
    values |= {"architecture": config["architectures"][0], "tried": len(record["runs"])}
    shared = config.get("num_key_value_heads")
    values["heads"] = f"8 query heads on {shared} key-value heads" if shared else "8 heads"
    values |= {"rows": "\n".join(rows), "samples": "\n\n".join(quotes)}
    (folder / "README.md").write_text(CARD.format(**values), encoding="utf-8")


def main() -> None:
    """Write the cards of the folders named."""
    parser = argparse.ArgumentParser(description="Write the cards of the built-in models.")
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        write_card(folder)


if __name__ == "__main__":
    main()
