"""What clients send: the requests of the OpenAI API, with vLLM's extra sampling fields at top level.

Ranges are checked by `SamplingParams`. Every error is a 400 that names the parameter and the value.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from flover.sampling_params import SamplingParams
from flover.server.bodies import NOT_YET, NOTHING, Body
from flover.server.errors import ApiError, from_value_error, invalid
from flover.server.tools import call_format, check_tools
from flover.show import show
from flover.structured import StructuredOutputsParams

MAX_LOGPROBS = 20
MAX_ROWS = 1024  # choices of one request, over all its prompts
MAX_ENTRIES = 1 << 20  # of a list, times the rows
GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")  # vLLM's older names
MAX_SECONDS = 1e6


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
    limit: ClassVar[str] = "max_tokens"  # what the endpoint calls it by now

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
        if self.wanted is not None:
            values["max_tokens"] = self.wanted
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
                text = str(error)
                raise invalid(text if text.startswith(name) else f"{name}: {text}", name) from None
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
        elif result.param == "max_tokens" and getattr(self, self.limit) is not None:
            result.param, result.message = self.limit, result.message.replace("max_tokens", self.limit)
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
    def wanted(self) -> int | None:
        """max_tokens, under either name."""
        newer: int | None = getattr(self, self.limit)
        return self.max_tokens if newer is None else newer

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    return_token_ids: bool | None = None

    subject, refused = "prompt", NOT_YET | {"add_special_tokens": (None, True)}

    def check(self) -> None:
        super().check()
        check_logprobs("logprobs", self.logprobs)

    @property
    def scores_prompt(self) -> bool:
        """Nothing is wanted but the prompt, and what the model thinks of it."""
        return bool(self.echo) and self.max_tokens == 0

    def values(self) -> dict[str, Any]:
        values = super().values()
        if self.echo and self.logprobs is not None:
            values["prompt_logprobs"] = self.logprobs
        if self.scores_prompt:
            values["max_tokens"] = 1  # the engine makes one in any case, and the answer leaves it out
        return values

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
    return_token_ids: bool | None = None

    subject, limit = "messages", "max_completion_tokens"
    refused = NOT_YET | {"add_special_tokens": (None, False), "documents": NOTHING, "echo": (None, False)}

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
        return call_format(self.tools, self.tool_choice, self.parallel_tool_calls, super().structured())

    def values(self) -> dict[str, Any]:
        values = super().values()
        values.pop("logprobs", None)
        if self.logprobs:
            values["logprobs"] = self.top_logprobs or 0
        return values


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
