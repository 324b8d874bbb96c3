"""For error messages: values in one line, not too long, whatever they are; and the name that was meant."""

from __future__ import annotations

from typing import Any


def show(value: Any) -> str:
    """A value for an error message: one line, not too long, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits has no repr
        text = f"{type(value).__name__} too large to print"
    except RecursionError:
        text = f"{type(value).__name__} nested too deeply to print"
    return text if len(text) <= 100 else text[:97] + "..."


def nearest(name: str, known: set[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or nothing."""
    import difflib

    match = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""
