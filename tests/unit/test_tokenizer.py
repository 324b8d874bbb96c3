"""Text: incremental detokenization, stop strings and chat templates, over random splits of random text."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import flover
from flover import chat_template
from flover.tokenizer import IncrementalDetokenizer, StopChecker, Tokenizer

BUILTIN = Path(flover.__file__).parent / "builtin" / "kjv-llama"
TOKENIZER = Tokenizer.from_folder(BUILTIN)
assert TOKENIZER is not None
VOCAB = 2560
TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aé€😀\ufffd \n")), max_size=60)
IDS = st.lists(st.integers(0, VOCAB + 3), max_size=60)


def byte_fallback() -> Tokenizer:
    """A SentencePiece-like tokenizer as LLaMA's: 256 byte tokens, words, "~" for nothing, the first space stripped."""
    words = ["▁a", "▁b", "b", "▁", "é", "▁😀", "~"]
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="▁"))
    steps = [
        decoders.Replace("▁", " "),
        decoders.Replace("~", ""),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(steps)
    return Tokenizer(backend)


FALLBACK = byte_fallback()


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
    pieces = [detokenizer.push(i) for i in ids] + [detokenizer.flush()]
    assert detokenizer.flush() == "", "flushing twice gives nothing"
    return pieces


# ---- detokenization ----------------------------------------------------------------------------------------


@given(TEXT)
def test_joined_pieces_are_the_text(text: str) -> None:
    pieces = stream(TOKENIZER, TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert pieces[-1] in ("", "\ufffd" * len(pieces[-1])), "whole characters do not wait for the end"


@given(IDS, st.booleans())
@settings(max_examples=300)
def test_any_ids_stream_as_they_decode(ids: list[int], skip: bool) -> None:
    assert "".join(stream(TOKENIZER, ids, skip)) == TOKENIZER.decode(ids, skip)


@given(st.lists(st.integers(1, 256), max_size=40))
@settings(max_examples=300)
def test_random_bytes_stream_as_they_decode(ids: list[int]) -> None:
    """The first 256 ids after the special one are single bytes, so this is mostly invalid UTF-8."""
    pieces = stream(TOKENIZER, ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


@given(TEXT, st.data())
def test_no_piece_ends_in_half_a_character(text: str, data: st.DataObject) -> None:
    text = text.replace("\ufffd", "?")
    ids = [i for character in text for i in TOKENIZER.encode(character)]
    cut = data.draw(st.integers(0, len(ids)))
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    given_out = "".join(detokenizer.push(i) for i in ids[:cut])
    assert "\ufffd" not in given_out
    assert text.startswith(given_out)
    rest = detokenizer.flush()
    assert len(rest) <= 1, "half a character is one U+FFFD"


def test_half_a_character_at_the_end_is_one_replacement() -> None:
    ids = TOKENIZER.encode("x😀")
    assert len(ids) == 5
    for cut in (2, 3, 4):
        assert "".join(stream(TOKENIZER, ids[:cut])) == "x\ufffd"


@given(st.lists(st.integers(256, 262), max_size=30))
def test_sentencepiece_spaces(ids: list[int]) -> None:
    assert "".join(stream(FALLBACK, ids)) == FALLBACK.decode(ids)


@given(st.text(st.sampled_from("é€😀ab"), min_size=1, max_size=20))
def test_byte_fallback_characters(text: str) -> None:
    ids = [256, *text.encode()]
    pieces = stream(FALLBACK, ids)
    assert "".join(pieces) == FALLBACK.decode(ids) == "a" + text
    assert "\ufffd" not in "".join(pieces)


def test_one_bad_byte_does_not_spoil_its_neighbours() -> None:
    ids = [256, *"€".encode(), 0xE2, 257]
    assert "".join(stream(FALLBACK, ids)) == "a€\ufffd b"


def test_space_at_the_joint_with_the_prompt() -> None:
    assert FALLBACK.decode([257]) == "b"
    assert IncrementalDetokenizer(FALLBACK, context=[256]).push(257) == " b"


@pytest.mark.parametrize("token", [0, 129, VOCAB + 7])
def test_look_back_is_bounded(token: int) -> None:
    """Special tokens, bytes that are never a character, unknown ids: none of them piles up."""
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    text = "".join(detokenizer.push(token) for _ in range(2000))
    assert len(detokenizer._pending) < 8
    assert len(detokenizer._prefix) < 8
    assert text + detokenizer.flush() == TOKENIZER.decode([token] * 2000)


def test_skip_special_tokens() -> None:
    ids = [*TOKENIZER.encode("Amen"), 0]
    assert "".join(stream(TOKENIZER, ids, skip=True)) == "Amen"
    assert "".join(stream(TOKENIZER, ids, skip=False)) == "Amen<|endoftext|>"


# ---- stop strings ------------------------------------------------------------------------------------------

STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def expected(text: str, stops: list[str], include: bool, floor: int = 0) -> tuple[str, str | None]:
    """The specification: earliest end beyond `floor` characters, then earliest start."""
    hits = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > floor
    ]
    if not hits:
        return text, None
    end, start, stop = min(hits)
    return text[: end if include else start], stop


@given(st.lists(st.text("abcd", max_size=4), max_size=12), STOPS, st.booleans(), st.integers(0, 4))
@settings(max_examples=500)
def test_stop_strings_for_any_split(pieces: list[str], stops: list[str], include: bool, unchecked: int) -> None:
    text, stop = expected("".join(pieces), stops, include, floor=len("".join(pieces[:unchecked])))
    checker, shown = StopChecker(stops, include), ""
    for i, piece in enumerate(pieces):
        shown += checker.push(piece, check=i >= unchecked)
        assert text.startswith(shown), "something was shown that had to be cut"
        if checker.found is not None:
            break
    else:
        shown += checker.flush()
    assert (shown, checker.found) == (text, stop)


def test_held_text_is_no_longer_than_needed() -> None:
    checker = StopChecker(["</end>"])
    assert checker.push("a < b </en") == "a < b "
    assert checker.push("x") == "</enx"


# ---- files -------------------------------------------------------------------------------------------------


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
def test_corrupt_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is corrupt") as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_lone_surrogate() -> None:
    with pytest.raises(ValueError, match="surrogate at character 1"):
        TOKENIZER.encode("a\ud800")


# ---- chat templates ----------------------------------------------------------------------------------------

CHATML = (
    "{{ bos_token }}\n{%- for m in messages %}\n"
    "    {{- '<' + m.role + '>' + m['content'] | trim + eos_token }}\n"
    "    {%- if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}\n"
    "    {%- if loop.index > 5 %}{% break %}{% endif %}\n"
    "{%- endfor %}\n{% generation %}{% endgeneration %}"
    "{% if add_generation_prompt %}{{ {'a': [1, '<é>']} | tojson }}<assistant>{% endif %}\n"
)
CHAT = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "yes?"}]


def with_template(folder: Path, **config: object) -> Tokenizer:
    (folder / "tokenizer.json").write_bytes((BUILTIN / "tokenizer.json").read_bytes())
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **config}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_template_sources(tmp_path: Path, form: str) -> None:
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}]
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    sources = {"text": {"chat_template": CHATML}, "list": {"chat_template": named}, "file": {"chat_template": "no"}}
    tokenizer = with_template(tmp_path, **sources[form])
    assert tokenizer.apply_chat_template(CHAT).startswith("<s><user>hi</s><assistant>yes?</s>")


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_renders_as_transformers(tmp_path: Path, generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = with_template(tmp_path, chat_template=CHATML).apply_chat_template(CHAT, generation_prompt)
    theirs, _ = render_jinja_template(
        [CHAT], chat_template=CHATML, add_generation_prompt=generation_prompt, bos_token="<s>", eos_token="</s>"
    )
    assert ours == theirs[0]


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert TOKENIZER.apply_chat_template([{"role": "user", "content": parts}]) == "a\nb\n"


@pytest.mark.parametrize(
    "messages",
    [
        "hi",
        [],
        None,
        ["hi"],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [{"role": "user"}],
        [{"role": "emperor", "content": "x"}],
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": None, "tool_calls": [{}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    ],
)
def test_bad_messages(messages: object) -> None:
    with pytest.raises(ValueError, match="message") as error:
        TOKENIZER.apply_chat_template(messages)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no\\nrobots') }}",
        "{% if",
        "{{ messages[0].nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 'x' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_bad_templates(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = with_template(tmp_path, chat_template=template)
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="chat template of") as error:
        tokenizer.apply_chat_template(CHAT)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 20


def test_formats_of_usual_width_stay(tmp_path: Path) -> None:
    template = "{{ '%5.2f' | format(1) }}|{{ '%03d' % 7 }}|{{ '{:>4}'.format('a') }}|{{ 'a' * 3 }}|{{ 2 * 3 }}"
    assert with_template(tmp_path, chat_template=template).apply_chat_template(CHAT) == " 1.00|007|   a|aaa|6"


def test_tools_calls_and_arguments_reach_the_template(tmp_path: Path) -> None:
    template = "{{ tools[0].name }} {{ messages[0].tool_calls[0].function.arguments.a }} {{ enable_thinking }}"
    call = {"function": {"name": "f", "arguments": '{"a": 3}'}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    tokenizer = with_template(tmp_path, chat_template=template)
    assert tokenizer.apply_chat_template(chat, True, [{"name": "f"}], {"enable_thinking": True}) == "f 3 True"
    for wrong in ({"tools": []}, {"add_generation_prompt": 1}, {"bos_token": "x"}, {"flover_tick": 1}, 5):
        with pytest.raises(ValueError, match="chat_template_kwargs"):
            tokenizer.apply_chat_template(CHAT, True, None, wrong)  # type: ignore[arg-type]


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        with_template(tmp_path).apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="must be text, got int"):
        with_template(tmp_path, chat_template=3)


def test_special_texts() -> None:
    assert TOKENIZER.is_special("<|endoftext|>")
    assert not TOKENIZER.is_special("the")
    assert not TOKENIZER.is_special("<tool_call>")
