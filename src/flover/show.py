"""Values in error messages: one line, not too long, whatever they are."""

from __future__ import annotations

from typing import Any


def show(value: Any) -> str:
    """A value for an error message: one line, not too long, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of thousands of digits has no repr
        text = f"a {type(value).__name__} too large to print"
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply to print"
    return text if len(text) <= 100 else text[:97] + "..."
