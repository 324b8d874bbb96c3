"""Grammars before requests run: each is compiled once in a child that may be killed, within CPU time and memory.

What a grammar costs cannot be told from its text. The child takes one after the other; when it exceeds a limit, the
kernel ends it, the grammar is refused, and the next one gets a new child. Run as
`python -m flover.engine.grammar_check`.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from flover.engine.grammar import Vocabulary, one_line

COMPILE_SECONDS = 1  # CPU time
COMPILE_BYTES = 1 << 30  # beyond what the child has with its vocabulary
MAX_KNOWN = 256
SIZE_BYTES = 4


class GrammarChecker:
    """`check` may be called from several threads; one grammar is compiled at a time."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._known: OrderedDict[str, str] = OrderedDict()  # grammar -> what is wrong with it, "": nothing

    def check(self, grammar: str) -> None:
        """Raises:
        ValueError: llguidance is missing, or it refuses the grammar, or compiling it takes too much.
        """
        if find_spec("llguidance") is None:
            raise ValueError('structured_outputs needs llguidance: pip install -e ".[structured]"')
        with self._lock:
            error = self._known.pop(grammar, None)
            if error is None:
                error = self._ask(grammar)
            self._known[grammar] = error
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        if error:
            raise ValueError(f"structured_outputs cannot be compiled: {error}")

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            assert child.stdin is not None
            assert child.stdout is not None
            child.kill()
            with suppress(OSError):
                child.stdin.close()
            child.stdout.close()
            child.wait()

    def _ask(self, grammar: str) -> str:
        try:
            child = self._started()
            _send(child.stdin, grammar)
            answer: str = _receive(child.stdout)
            return answer
        except (EOFError, OSError):
            code = self._child.wait() if self._child else 0
            self.close()
            if code == -signal.SIGPROF:
                return f"it takes more than {COMPILE_SECONDS} s; a smaller or simpler one works"
            why = f"its compiler ended with exit code {code}, as where {COMPILE_BYTES >> 20} MiB of memory are too few"
            return f"{why}; a smaller or simpler one may work"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            command = [sys.executable, "-m", "flover.engine.grammar_check"]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not for it
            )
            vocabulary = self._vocabulary
            _send(self._child.stdin, [str(vocabulary.folder), vocabulary.size, vocabulary.eos_token_ids])
        return self._child


def _send(pipe: BinaryIO | Any, message: Any) -> None:
    data = msgspec.msgpack.encode(message)
    pipe.write(len(data).to_bytes(SIZE_BYTES, "big") + data)
    pipe.flush()


def _receive(pipe: BinaryIO | Any) -> Any:
    size = int.from_bytes(pipe.read(SIZE_BYTES), "big")
    data = pipe.read(size)
    if not data:
        raise EOFError
    return msgspec.msgpack.decode(data)


# ---- in the child ----------------------------------------------------------------------------------------------------


def _verdict(vocabulary: Vocabulary, grammar: str) -> str:
    """What is wrong with a grammar; its first mask, which may cost more than the rest, is made too."""
    try:
        matcher = vocabulary.compile(grammar)
    except ValueError as error:
        return str(error) or "llguidance gives no reason"
    mask = np.zeros(vocabulary.mask_bytes, dtype=np.uint8)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error():
        reason = one_line(matcher)
        return "no text satisfies it" if reason.startswith("NoExtension") else reason
    return "" if mask.any() else "no token of the vocabulary can begin it"


def main() -> int:
    """Grammars from stdin, verdicts to stdout, until stdin ends; -> exit code."""
    import resource

    folder, size, eos = _receive(sys.stdin.buffer)
    vocabulary = Vocabulary(Path(folder), size, eos)
    try:
        vocabulary.compile('{"grammars":[{"lark_grammar":"start: \\"a\\""}]}')
        failure = ""
    except ValueError as error:
        failure = f"the tokenizer does not suit llguidance: {error}"
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + COMPILE_BYTES, resource.RLIM_INFINITY))
    with suppress(EOFError):
        while True:
            grammar = _receive(sys.stdin.buffer)
            signal.setitimer(signal.ITIMER_PROF, COMPILE_SECONDS)  # not RLIMIT_CPU, which has whole seconds only
            _send(sys.stdout.buffer, failure or _verdict(vocabulary, grammar))
    return 0


def _data_bytes() -> int:
    """Private memory that this process has now (Linux; elsewhere nothing is known)."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return COMPILE_BYTES


if __name__ == "__main__":
    sys.exit(main())
