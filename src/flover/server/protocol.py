"""What clients send: the requests of the OpenAI API, with vLLM's extra sampling fields at top level.

Types are checked here, and ranges by `SamplingParams`. Every error is a 400 that names the parameter and the value.
Fields that are not known are ignored and logged once; those that ask for what is not there yet are refused.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError

from flover.request import SamplingParams, show
from flover.server.errors import ApiError, from_value_error, invalid
from flover.server.tools import call_schema, check_tools
from flover.structured import StructuredOutputsParams

MAX_LOGPROBS = 20
MAX_ROWS = 1024  # choices of one request, over all its prompts
MAX_ENTRIES = 1 << 20  # of a list, times the rows
MAX_TOLD = 256  # names of ignored fields
logger = logging.getLogger("flover")
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # vLLM's older names
MAX_SECONDS = 1e6
NOTHING: tuple[Any, ...] = (None, [], {}, "")
NOT_YET: dict[str, tuple[Any, ...]] = {  # field -> the values that ask for nothing
    "suffix": NOTHING,
    "functions": NOTHING,
    "function_call": (*NOTHING, "none", "auto"),
    "audio": NOTHING,
    "modalities": (*NOTHING, ["text"]),
    "chat_template": NOTHING,
    "use_beam_search": (None, False),
    "continue_final_message": (None, False),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
}


class Body(BaseModel):
    """A JSON object; strict: `"2"` is no number and `true` no integer."""

    model_config = ConfigDict(strict=True, extra="allow")

    def check(self) -> None:
        """Refuse what is not there yet."""
        for name, idle in NOT_YET.items():
            value = (self.model_extra or {}).get(name)
            if not any(value == one and type(value) is type(one) for one in idle):
                raise invalid(f"{name} is not supported, got {show(value)}", name)


class Ignored:
    """Fields that nobody here knows, told once each: most are other servers', some are spelling mistakes."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def note(self, body: Body) -> None:
        new = [name for name in body.model_extra or () if name not in self._told and name not in NOT_YET]
        if new and len(self._told) < MAX_TOLD:
            self._told.update(new)
            logger.warning("fields of a request are ignored: %s", ", ".join(show(name) for name in new[:20]))


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationRequest(Body):
    """What completions and chats have in common; None is "not given"."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    seed: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int | None = None
    timeout: float | None = None
    queue_timeout: float | None = None
    cache_salt: str | None = None

    subject: ClassVar[str]  # the field that an error is about when it names no other

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid(f"best_of must be n, got {show(self.best_of)}", "best_of")
        for name in ("timeout", "queue_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not 0 < seconds < MAX_SECONDS:
                raise invalid(f"{name} must be seconds in (0, {MAX_SECONDS:g}), got {show(seconds)}", name)
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream to be true", "stream_options")

    def values(self) -> dict[str, Any]:
        """What was given of `SamplingParams`' fields."""
        names = SamplingParams.__dataclass_fields__
        values = {k: v for k in type(self).model_fields if k in names and (v := getattr(self, k)) is not None}
        structured = self.structured()
        return values if structured is None else {**values, "structured_outputs": structured}

    def structured(self) -> StructuredOutputsParams | None:
        """What the text must follow: of response_format, structured_outputs and the guided_ fields one at most."""
        wanted = {
            "response_format": format_schema(self.response_format),
            "structured_outputs": self.structured_outputs,
            **{name: {name[7:]: v} for name in GUIDED if (v := getattr(self, name)) is not None},
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        if len(given) > 1:
            raise invalid(f"{' and '.join(given)} exclude each other", list(given)[1])
        for name, value in given.items():
            try:
                return StructuredOutputsParams.of(value)
            except ValueError as error:
                raise invalid(f"{name}: {error}", name) from None
        return None

    def sampling_params(self, base: SamplingParams) -> SamplingParams:
        """`base` with what was given on top; ApiError names the parameter at fault."""
        try:
            return SamplingParams.from_dict(self.values(), base)
        except ValueError as error:
            raise self.error(error) from None

    def error(self, error: ValueError) -> ApiError:
        """A ValueError about this request."""
        result = from_value_error(error, type(self).model_fields, self.subject)
        if result.param == "structured_outputs" and self.structured_outputs is None:
            names = ("response_format", *GUIDED, "tools", "text")
            result.param = next((n for n in names if getattr(self, n, None)), self.subject)
            result.message = result.message.replace("structured_outputs", result.param, 1)
        return result

    def check_rows(self, num_prompts: int) -> None:
        """ApiError for more rows than one request may have, or for lists that would be copied to too many."""
        n = self.n or 1
        if n * num_prompts > MAX_ROWS:
            raise invalid(f"n={n} for {num_prompts} prompts makes more than {MAX_ROWS} choices", "n")
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            size = len(getattr(self, name) or ())
            if size * n * num_prompts > MAX_ENTRIES:
                raise invalid(f"{name} of {size} entries for {n * num_prompts} choices is too much", name)

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None

    subject = "prompt"

    def check(self) -> None:
        super().check()
        check_logprobs("logprobs", self.logprobs)

    def values(self) -> dict[str, Any]:
        scored = {"prompt_logprobs": self.logprobs} if self.echo and self.logprobs is not None else {}
        return {**super().values(), **scored}

    def prompts(self) -> list[Any]:
        """One prompt for the engine each: text or a list of token ids."""
        return prompts_of("prompt", self.prompt)


class ChatCompletionRequest(GenerationRequest):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    subject = "messages"

    def check(self) -> None:
        super().check()
        check_tools(self.tools, self.tool_choice)
        check_logprobs("top_logprobs", self.top_logprobs)
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid(f"top_logprobs needs logprobs to be true, got {self.top_logprobs}", "top_logprobs")

    @property
    def given_tools(self) -> list[dict[str, Any]] | None:
        """Those that the model is told of."""
        return None if self.tool_choice == "none" else self.tools or None

    def structured(self) -> StructuredOutputsParams | None:
        wanted = super().structured()
        try:
            called = call_schema(self.tools, self.tool_choice, self.parallel_tool_calls)
        except RecursionError:
            raise invalid("tools are nested too deeply", "tools") from None
        if called is None:
            return wanted
        if wanted is not None:
            raise invalid("tool_choice asks for a call, which excludes another format of the text", "tool_choice")
        try:
            return StructuredOutputsParams(json=called, whitespace_pattern=" ?")  # as models write calls
        except ValueError as error:
            raise invalid(f"tools: {error}", "tools") from None

    def values(self) -> dict[str, Any]:
        values = super().values()
        values.pop("logprobs", None)
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        return values

    def error(self, error: ValueError) -> ApiError:
        result = super().error(error)
        if result.param == "max_tokens" and self.max_completion_tokens is not None:
            result.param = "max_completion_tokens"
            result.message = result.message.replace("max_tokens", "max_completion_tokens")
        return result


class TokenizeRequest(Body):
    """vLLM's: of a text, or of a conversation as the chat template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None

    def check(self) -> None:
        super().check()
        if (self.prompt is None) == (self.messages is None):
            raise invalid("give prompt or messages, one of them", "prompt")

    @property
    def given_tools(self) -> list[dict[str, Any]] | None:
        return self.tools


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


def prompts_of(name: str, prompt: Any) -> list[Any]:
    """Prompts for the engine, text or a list of token ids each; ApiError for what is none. name: of the field."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, int) for one in prompt):
            return [prompt]
        if all(isinstance(one, str) for one in prompt) or all(isinstance(one, list) for one in prompt):
            if len(prompt) > MAX_ROWS:
                raise invalid(f"{name} holds {len(prompt)} prompts, the limit is {MAX_ROWS}", name)
            return prompt
    wanted = "text, a list of texts, a list of token ids or a list of such lists"
    raise invalid(f"{name} must be {wanted}, and not empty; got {show(prompt)}", name)


def format_schema(value: Any, name: str = "response_format") -> dict[str, Any] | None:
    """OpenAI's response_format as `StructuredOutputsParams` has it; None: any text. name: of the field.

    Raises:
        ApiError: another type, or a json_schema without a schema.
    """
    if not isinstance(value, dict):
        value = {"type": "text" if value is None else value}
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise invalid(f"{name}: type must be text, json_object or json_schema, got {show(kind)}", name)
    named = value.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise invalid(f"{name}: json_schema needs a schema, got {show(value)}", name)
    return {"json": schema}


def check_logprobs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise invalid(f"{name} must be in [0, {MAX_LOGPROBS}], got {show(value)}", name)


B = TypeVar("B", bound=Body)


def decode(body: bytes, kind: type[B]) -> B:
    """A request from its JSON; ApiError if it is none."""
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as error:  # malformed, not UTF-8, or a number without end
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid(f"the body must be a JSON object, got {show(value)}")
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise _from_validation(error) from None
    request.check()
    return request


def _from_validation(error: ValidationError) -> ApiError:
    """The first parameter at fault, with all the types that it may have."""
    details = error.errors(include_url=False, include_context=False)
    param = str(details[0]["loc"][0])
    if details[0]["type"] == "missing":
        return invalid(f"{param} is required", param)
    wanted = {detail["msg"].removeprefix("Input should be ") for detail in details if str(detail["loc"][0]) == param}
    return invalid(f"{param} must be {' or '.join(sorted(wanted))}, got {show(details[0]['input'])}", param)
