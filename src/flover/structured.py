"""Structured output: what the text of a request must look like, and the grammar that says so to llguidance.

Names follow vLLM's `StructuredOutputsParams`. Nothing is compiled here; `engine.grammar` does it, within limits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from flover.show import show

MAX_GRAMMAR_LENGTH = 1 << 18  # characters
MAX_CHOICES = 4096
WHITESPACE = r"[ \t]?(\n[ \t]{0,16})?"  # between JSON tokens; unbounded, a model can go on with it for ever
KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """One of the first five says what a text must be; frozen and checked at construction.

    Args:
        json: a JSON schema, as a dict or as text.
        regex: the whole text matches it (Rust's syntax: no look-around, no back references).
        choice: the text is one of these.
        grammar: in Lark's syntax, or GBNF; begins at `start` or `root`.
        json_object: any JSON object.
        disable_any_whitespace: JSON without whitespace between its tokens.
        whitespace_pattern: a regex for that whitespace; None: a space, or a line break with its indent.

    Raises:
        ValueError: naming the field, the value and what would work.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = f"{' and '.join(given)} were given" if given else "nothing was given"
            raise ValueError(f"structured_outputs takes one of {', '.join(KINDS)}; {what}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be a non-empty text, got {show(value)}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema(self.json))
        if self.choice is not None:
            _check_choice(self.choice)
            object.__setattr__(self, "choice", tuple(self.choice))
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) not in (None, True, False):
                raise ValueError(f"{name} must be True or False, got {show(getattr(self, name))}")

    @classmethod
    def of(cls, value: Any) -> StructuredOutputsParams:
        """From itself or from a mapping of its fields."""
        if isinstance(value, cls):
            return value
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            raise ValueError(f"structured_outputs must have one of {', '.join(KINDS)}, got {show(value)}")
        return cls(**value)

    def grammar_text(self) -> str:
        """What llguidance compiles: JSON of its own format. ValueError if it is too long, or is GBNF with a mistake."""
        text = json.dumps({"grammars": [self._grammar()]}, separators=(",", ":"))
        if len(text) > MAX_GRAMMAR_LENGTH:
            raise ValueError(f"the grammar has {len(text)} characters, the limit is {MAX_GRAMMAR_LENGTH}")
        return text

    def _grammar(self) -> dict[str, Any]:
        if self.regex is not None:
            return {"lark_grammar": f"start: TEXT\nTEXT: {_lark_regex(self.regex)}"}
        if self.choice is not None:
            return {"lark_grammar": "start: " + " | ".join(json.dumps(choice) for choice in self.choice)}
        if self.grammar is not None:
            return {"lark_grammar": _lark(self.grammar)}
        schema = {"type": "object"} if self.json is None else self.json
        spacing: dict[str, Any] = {"whitespace_pattern": self.whitespace_pattern or WHITESPACE}
        if self.disable_any_whitespace:
            spacing = {"whitespace_flexible": False}
        assert isinstance(schema, Mapping)
        return {"json_schema": {**schema, "x-guidance": spacing}}


def _schema(schema: Any) -> dict[str, Any]:
    """A schema as a dict that JSON can hold."""
    try:
        schema = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except RecursionError:
        raise ValueError("json is a schema that is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"json must be a JSON schema: {error}") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError(f"json must be a JSON schema, an object, got {show(schema)}")
    return schema


def _check_choice(choices: Any) -> None:
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise ValueError(f"choice must be a non-empty list of texts, got {show(choices)}")
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"choice has {len(choices)} texts, the limit is {MAX_CHOICES}")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ValueError(f"choice must hold non-empty texts, got {show(choice)}")


def _lark_regex(regex: str) -> str:
    """A regular expression as a Lark terminal, delimited by slashes."""
    escaped, backslash = [], False
    for character in regex:
        if character == "/" and not backslash:
            escaped.append("\\/")
        elif character == "\n":
            escaped.append("n" if backslash else "\\n")
        else:
            escaped.append(character)
        backslash = character == "\\" and not backslash
    return f"/{''.join(escaped)}/"


def _lark(grammar: str) -> str:
    """Lark as it is, GBNF (`root ::= ...`) translated."""
    if "::=" not in grammar:
        return grammar
    try:
        from llguidance.gbnf_to_lark import gbnf_to_lark
    except ImportError:
        return grammar  # `engine.grammar` says what to install
    try:
        return str(gbnf_to_lark(grammar))
    except RecursionError:
        raise ValueError("grammar is nested too deeply") from None
    except Exception as error:  # its parser raises plain exceptions
        raise ValueError(f"grammar is not GBNF: {' '.join(str(error).split())}") from None
