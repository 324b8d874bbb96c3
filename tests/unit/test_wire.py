"""Frames between front and engine: whole again however the bytes are cut; a closed end is told apart from silence."""

from __future__ import annotations

import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flover.config import EngineConfig
from flover.engine.wire import Connection, Finish, NewRequest, Outbox, Start, ToEngine
from flover.request import FinishReason, Request, RowSampling

MESSAGES = st.lists(
    st.one_of(
        st.builds(
            Finish, st.text(max_size=9), st.sampled_from(FinishReason), st.none() | st.integers(0, 9) | st.text()
        ),
        st.builds(
            lambda ids, text, n: NewRequest.of(Request(text, ids, RowSampling(seed=n, logit_bias=((1, 0.5),)), n + 1)),
            st.lists(st.integers(0, 2**31), min_size=1, max_size=400),
            st.text(max_size=5),
            st.integers(0, 2**63),
        ),
        st.just(Start(EngineConfig(seed=7))),
    ),
    max_size=6,
)


@given(MESSAGES, st.lists(st.integers(1, 700), max_size=30))
def test_messages_survive_any_cut(messages: list[ToEngine], cuts: list[int]) -> None:
    a, b = socket.socketpair()
    sender, receiver = Connection(a, ToEngine), Connection(b, ToEngine)
    for message in messages:
        sender.send(message)
    a.shutdown(socket.SHUT_WR)
    whole = b""
    while part := b.recv(1 << 16):
        whole += part
    c, d = socket.socketpair()
    receiver.socket = d
    got: list[ToEngine] = []
    start = 0
    for cut in [*cuts, len(whole)]:
        piece = whole[start : start + cut]
        start += cut
        if piece:
            c.sendall(piece)
            got += receiver.receive()
    assert got == messages
    c.close()
    with pytest.raises(EOFError):
        list(receiver.receive())
    for end in (a, b, d):
        end.close()


def test_a_request_comes_through_whole() -> None:
    sampling = RowSampling(seed=3, temperature=0.5, bad_words=((1, 2),), allowed_token_ids=(4,), logprobs=2)
    first = Request("a", [1, 2], sampling, 7, frozenset({5}), frozenset({5}), 1, 2, "salt", "key", 3.5)
    second = Request("a#1", [1, 2], sampling, 7, sibling=first)
    back = NewRequest.of(first).request(None)
    for name in ("request_id", "token_ids", "sampling", "max_output_tokens", "stop_token_ids", "eos_token_ids"):
        assert getattr(back, name) == getattr(first, name)
    assert (back.prompt_logprobs, back.priority, back.cache_salt) == (1, 2, "salt")
    assert (back.client, back.arrival_time) == ("key", 3.5)
    assert back.logprobs == []
    assert NewRequest.of(second).sibling == "a"


@pytest.mark.parametrize("blocking", [True, False])
def test_what_the_socket_does_not_take_at_once_follows(blocking: bool) -> None:
    """uvloop makes a socket that it polls non-blocking without telling Python."""
    a, b = socket.socketpair()
    outbox, receiver = Outbox(Connection(a, ToEngine)), Connection(b, ToEngine)
    os.set_blocking(a.fileno(), blocking)
    messages = [Finish("x" * 200_000, FinishReason.ABORT, i) for i in range(20)]
    for message in messages:
        outbox.send(message)
    b.settimeout(20)
    got: list[ToEngine] = []
    while len(got) < len(messages):
        got += receiver.receive()
    assert got == messages
    outbox.close()
    a.close()
    b.close()
