"""SamplingParams: what is accepted, and a one-line error naming field and value for everything else."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from flover.sampling_params import MAX_LIST, MAX_LOGPROBS, MAX_N, MAX_STOP_LENGTH, MAX_STOP_STRINGS, SamplingParams

NOT_NUMBERS: list[Any] = [None, "1", True, [1], math.nan, 1 + 2j]
NOT_INTEGERS: list[Any] = ["1", True, 1.0, math.nan, [1]]
NOT_FLAGS: list[Any] = [None, 0, 1, "yes"]

BAD: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, MAX_N + 1, None, *NOT_INTEGERS]),
    ("temperature", [-0.1, 1e5, math.inf, *NOT_NUMBERS]),
    ("top_k", [-2, 2**31, None, *NOT_INTEGERS]),
    ("top_p", [0, 0.0, -0.1, 1.1, math.inf, *NOT_NUMBERS]),
    ("min_p", [-0.1, 1.1, *NOT_NUMBERS]),
    ("repetition_penalty", [0, -1.0, 1e9, math.inf, *NOT_NUMBERS]),
    ("presence_penalty", [-2.1, 2.1, *NOT_NUMBERS]),
    ("frequency_penalty", [-2.1, 2.1, *NOT_NUMBERS]),
    ("max_tokens", [0, -1, 2**31, *NOT_INTEGERS]),
    ("min_tokens", [-1, 17, None, *NOT_INTEGERS]),
    ("seed", [-1, 2**64, *NOT_INTEGERS]),
    ("logprobs", [-1, MAX_LOGPROBS + 1, *NOT_INTEGERS]),
    ("prompt_logprobs", [-1, MAX_LOGPROBS + 1, *NOT_INTEGERS]),
    ("ignore_eos", NOT_FLAGS),
    ("skip_special_tokens", NOT_FLAGS),
    ("include_stop_str_in_output", NOT_FLAGS),
    ("priority", [None, 2**40, *NOT_INTEGERS]),
    ("stop", [3, "", [""], [1], ["a"] * (MAX_STOP_STRINGS + 1), "x" * (MAX_STOP_LENGTH + 1), "\ud800"]),
    ("bad_words", [3, "", [""], [None], ["a"] * 2000]),
    ("stop_token_ids", [3, "12", [1.0], ["1"], [True], [-1], [2**40], range(MAX_LIST + 1)]),
    ("allowed_token_ids", [3, "12", [], [1.0], [-1], [None]]),
    ("structured_outputs", [3, "{}", ["a"], {}, {"json": {}, "regex": "a"}]),
    (
        "logit_bias",
        [
            [1],
            dict.fromkeys(range(MAX_LIST + 1), 0),
            *({1: value} for value in (math.nan, 101, -101.0, "2", True)),
            *({key: 0} for key in (-1, "a", 1.5)),
        ],
    ),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


def test_every_field_has_a_bad_value() -> None:
    assert {name for name, _ in BAD} == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"top_k": -1},
        {"top_p": 1e-9},
        {"max_tokens": None},
        {"max_tokens": 5, "min_tokens": 5},
        {"seed": 2**64 - 1},
        {"logit_bias": {}},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"n": MAX_N},
    ],
)
def test_edges_are_accepted(values: dict[str, Any]) -> None:
    SamplingParams(**values)


def test_normal_forms() -> None:
    params = SamplingParams(stop="END", stop_token_ids={3}, bad_words=["x"], logit_bias={"7": 1}, temperature=1)
    assert (params.stop, params.stop_token_ids, params.bad_words) == (("END",), (3,), ("x",))
    assert params.logit_bias == {7: 1.0}
    assert isinstance(params.temperature, float)
    assert SamplingParams(stop=None, bad_words=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 2  # type: ignore[misc]


def test_min_tokens_names_both() -> None:
    with pytest.raises(ValueError, match=r"min_tokens must be at most max_tokens 5, got 6"):
        SamplingParams(max_tokens=5, min_tokens=6)


def test_from_dict() -> None:
    base = SamplingParams(temperature=0.5, stop=["a"])
    assert SamplingParams.from_dict({"top_k": 3}, base) == SamplingParams(temperature=0.5, stop=["a"], top_k=3)
    with pytest.raises(ValueError, match=r"unknown sampling parameter 'temprature'; did you mean 'temperature'\?"):
        SamplingParams.from_dict({"temprature": 1})
    with pytest.raises(ValueError, match="unknown sampling parameter 'zzz'$"):
        SamplingParams.from_dict({"zzz": 1})
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams.from_dict({"top_p": 2}, base)
