"""`flover chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from flover.cli.display import visible
from flover.cli.generate import base_params
from flover.llm import LLM
from flover.sampling_params import SamplingParams

HELP = "/reset forgets the conversation, /help prints this; Ctrl-C interrupts an answer, Ctrl-D ends"


def run_chat(system: str, sampling: Mapping[str, Any], engine: Mapping[str, Any]) -> int:
    """The loop of questions and answers; ends with the input."""
    SamplingParams(**sampling)
    with LLM(**engine) as llm:
        tokenizer = llm.engine.tokenizer
        if tokenizer is None or tokenizer.chat_template is None:
            raise ValueError(f"{llm.engine.folder} has no chat template; `flover generate` needs none")
        params = base_params(llm, sampling, None)
        start = [{"role": "system", "content": system}] if system else []
        history = list(start)
        if sys.stdin.isatty():
            print(HELP)
        for question in _questions():
            if question == "/reset":
                history = list(start)
            elif question.startswith("/"):
                print(HELP if question == "/help" else f"unknown command {question}: {HELP}")
            elif question:
                history.append({"role": "user", "content": question})
                try:
                    answer = _answer(llm, history, params)
                except ValueError as error:  # too long for the context, or the template objects
                    history.pop()
                    print(f"flover: error: {error}; /reset begins anew", file=sys.stderr)
                else:
                    history.append({"role": "assistant", "content": answer})
    return 0


def _questions() -> Iterator[str]:
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (line editing for input())
    while True:
        try:
            yield input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(Ctrl-D ends)")


def _answer(llm: LLM, history: list[dict[str, str]], params: SamplingParams) -> str:
    """Stream one answer; Ctrl-C cuts it short."""
    prompt, text = llm.chat_prompt(history), ""
    show = visible if sys.stdout.isatty() else str
    stream = llm.stream(prompt, params)
    try:
        for output in stream:
            choice = output.outputs[0]
            print(show(choice.text[len(text) :]), end="", flush=True)
            text = choice.text
            if choice.error:
                print(f"\nflover: error: {choice.error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(" (interrupted)", end="")
    finally:
        stream.close()  # type: ignore[attr-defined]
    print(flush=True)
    return text
