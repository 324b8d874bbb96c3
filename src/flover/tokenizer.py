"""Text in and out: a Hugging Face tokenizer, its chat template, incremental detokenization and stop strings.

Invariants: streamed text never holds half a UTF-8 character, joined pieces equal the final text, and nothing
that a stop string could still cut off is given out. Work per token is bounded, however long the output is.
Sources: the prefix/read offset technique of TGI and vLLM; chat templates as transformers renders them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from flover.chat_template import check_arguments, check_messages, find_template, render
from flover.model_config import read_json

REPLACEMENT = "\ufffd"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """tokenizer.json and what tokenizer_config.json says beside it.

    Args:
        backend: the tokenizer; its own post-processor adds bos/eos, as with transformers' fast tokenizers.
        special_tokens: name ("bos_token") -> text, for the chat template.
        chat_template: Jinja source, or None.
        name: of the folder, for messages.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        name: str = "the tokenizer",
    ) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self._name = name

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer | None:
        """None where there is no tokenizer.json; ValueError if a file is corrupt."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(f"{path} is corrupt: {_one_line(error)}") from None
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        tokens = {name: config.get(name) for name in SPECIAL_NAMES}
        contents = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
        special = {n: t for n, t in contents.items() if isinstance(t, str)}
        return cls(backend, special, find_template(folder, config), str(folder))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest entry of the vocabulary."""
        return max(map(len, self._backend.get_vocab()), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; ValueError for text that has no UTF-8 form."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds a lone surrogate at character {error.start}, which no UTF-8 can hold"
            ) from None
        # `encode` would hold the interpreter's lock all the time, and with it every other thread
        encoded = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; invalid UTF-8 becomes U+FFFD, ids that the tokenizer does not know become nothing."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def is_special(self, text: str) -> bool:
        """Whether this is a special token, which decoding may leave out."""
        return self._backend.token_to_id(text) in self._special

    def is_visible(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether decode turns it into text at all."""
        if token_id in self._special:
            return not skip_special_tokens
        return self._backend.id_to_token(token_id) is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation (encode it without special tokens: the template writes its own).

        Args:
            messages: {"role": ..., "content": text or [{"type": "text", "text": ...}]}, in order.
            tools: that the model may call, as OpenAI has them. arguments: more variables for the template.

        Raises:
            ValueError: bad messages, no template, or a template that fails or objects.
        """
        chat = check_messages(messages)
        check_arguments(arguments or {}, self._special_tokens)
        if self.chat_template is None:
            raise ValueError(f"{self._name} has no chat template (tokenizer_config.json, chat_template.jinja)")
        try:
            return render(self.chat_template, chat, add_generation_prompt, self._special_tokens, tools, arguments)
        except Exception as error:  # a template can fail in any way that Python can
            raise ValueError(f"the chat template of {self._name} failed: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class IncrementalDetokenizer:
    """Token ids in, whole characters out.

    New text is what decoding `prefix + pending` has beyond `prefix`, the tokens given out last; a tail of U+FFFD
    may be half a character and waits. A character has at most four bytes, so it waits for `MAX_WAIT` tokens.

    Args:
        context: ids before the first one (the end of the prompt), which decide on a leading space.
    """

    MAX_WAIT = 4

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._pending: list[int] = []
        self._prefix = [i for i in context if tokenizer.is_visible(i, skip_special_tokens)]
        self._prefix_text = self._decode(self._prefix)
        if self._prefix_text.endswith(REPLACEMENT):  # ends in half a character: not a context to build on
            self._prefix, self._prefix_text = [], ""

    def push(self, token_id: int) -> str:
        """The new text that this token completes."""
        if not self._tokenizer.is_visible(token_id, self._skip):
            return ""
        self._pending.append(token_id)
        text = self._new_text()
        if text and not text.endswith(REPLACEMENT):
            self._advance(len(self._pending))
            return text
        return "" if len(self._pending) < self.MAX_WAIT else self._release(text)

    def flush(self) -> str:
        """What still waits, at the end: half a character is U+FFFD now."""
        text = self._new_text()
        self._advance(len(self._pending))
        return text

    def _release(self, text: str) -> str:
        """Bytes that can no longer become a character: give out up to a boundary that splits none."""
        pending = self._pending
        for n in range(len(pending) - 1, 0, -1):
            head = self._new_text(n)
            if head and head + self._decode(pending[n:]) == text:
                self._advance(n)
                return head
        if len(pending) < 2 * self.MAX_WAIT:
            return ""
        self._advance(len(pending))
        return text

    def _new_text(self, count: int | None = None) -> str:
        pending = self._pending[:count]
        whole = self._decode(self._prefix + pending)
        # byte-fallback decoders spoil a whole run of bytes for one bad byte: look at the new tokens alone
        return whole[len(self._prefix_text) :] if whole.startswith(self._prefix_text) else self._decode(pending)

    def _advance(self, count: int) -> None:
        if count:
            self._prefix, self._pending = self._pending[:count], self._pending[count:]
            self._prefix_text = self._decode(self._prefix)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip) if token_ids else ""


class StopChecker:
    """Finds the first stop string that a stream of text completes; what could begin one is held back.

    "First" is the earliest end, then the earliest start, so the result does not depend on how the text was cut
    into pieces. `found` is the stop string once there is one; nothing may be pushed after that.
    """

    def __init__(self, stops: Sequence[str], include_in_output: bool = False) -> None:
        self._stops, self._include = tuple(stops), include_in_output
        self._first_characters = {stop[0] for stop in self._stops}
        self._reach = max(map(len, self._stops), default=1) - 1  # characters an unfinished stop string can have
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, check: bool = True) -> str:
        """Text that is safe to show. With check=False (before min_tokens) no stop string can end in `text`."""
        assert self.found is None
        if not text or not self._stops:
            return text
        buffer, new = self._held + text, len(self._held)
        ends = []
        for stop in self._stops if check else ():
            start = buffer.find(stop, max(0, new - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if ends:
            end, start, self.found = min(ends)
            self._held = ""
            return buffer[: end if self._include else start]
        cut = self._first_candidate(buffer)
        self._held = buffer[cut:]
        return buffer[:cut]

    def flush(self) -> str:
        """The held text, at the end."""
        held, self._held = self._held, ""
        return held

    def _first_candidate(self, buffer: str) -> int:
        """Where the longest tail begins that is the beginning of a stop string."""
        for start in range(max(0, len(buffer) - self._reach), len(buffer)):
            if buffer[start] in self._first_characters and any(s.startswith(buffer[start:]) for s in self._stops):
                return start
        return len(buffer)
