"""Log-probabilities as OpenAI's completions and chats have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flover.request import TokenLogprobs


def completion_logprobs(
    tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], offset: int, best: int, first: str = ""
) -> tuple[dict[str, Any], int]:
    """OpenAI's lists, one entry per token, and where the next one begins in the text.

    Args:
        offset: of the first token. first: its text, if it is a prompt's and has no probability.
    """
    result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, entry in zip(tokens, entries):
        text = first if entry is None else entry[token].decoded_token or ""
        result["tokens"].append(text)
        result["token_logprobs"].append(None if entry is None else entry[token].logprob)
        # the one that was drawn is always there, as the API says
        top = None if entry is None else {**dict(_best(entry, best)), text: entry[token].logprob}
        result["top_logprobs"].append(top)
        result["text_offset"].append(max(offset, 0))
        offset += len(text)
    return result, offset


def chat_logprobs(tokens: Sequence[int], entries: Sequence[TokenLogprobs], best: int) -> list[dict[str, Any]]:
    def one(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return [
        {
            **one(entry[token].decoded_token or "", entry[token].logprob),
            "top_logprobs": [one(text, value) for text, value in _best(entry, best)],
        }
        for token, entry in zip(tokens, entries)
    ]


def _best(entry: Mapping[int, Any], best: int) -> list[tuple[str, float]]:
    ranked = sorted(entry.values(), key=lambda one: one.rank)
    return [(one.decoded_token or "", one.logprob) for one in ranked[:best]]
