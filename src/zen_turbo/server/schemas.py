"""What a chat request may say, and which of it is honoured.

Three kinds of fields: honoured; refused by name where they ask for something that is not there yet (a neutral value passes); and accepted
without effect, which is what clients send for other services. A key that nobody knows is accepted too, with one line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import pydantic

from zen_turbo.engine.request import SamplingParams
from zen_turbo.errors import InvalidRequestError, UnsupportedParameterError

logger = logging.getLogger("zen_turbo.server")

_IGNORED = frozenset(
    """user metadata store service_tier prompt_cache_key prompt_cache_retention safety_identifier verbosity parallel_tool_calls cache_prompt
    reasoning_effort timings_per_token""".split()
)

# Field -> whether its value asks for nothing.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "best_of": lambda value: value == 1,
    "logprobs": lambda value: value is False,
    "top_logprobs": lambda value: value == 0,
    "prompt_logprobs": lambda value: value == 0,
    "logit_bias": lambda value: value == {},
    "presence_penalty": lambda value: value == 0,
    "frequency_penalty": lambda value: value == 0,
    "repetition_penalty": lambda value: value == 1,
    "min_tokens": lambda value: value == 0,
    "response_format": lambda value: isinstance(value, dict) and value.get("type") == "text",
    "tools": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "functions": lambda value: value == [],
    "function_call": lambda value: value in ("none", "auto"),
    "modalities": lambda value: value == ["text"],
    "audio": lambda value: False,
    "prediction": lambda value: False,
    "chat_template": lambda value: False,
    "truncate_prompt_tokens": lambda value: False,
    "echo": lambda value: value is False,
    "continue_final_message": lambda value: value is False,
    "skip_special_tokens": lambda value: value is True,
    "include_stop_str_in_output": lambda value: value is False,
}


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    include_usage: bool = False


class ChatRequest(pydantic.BaseModel):
    """Body of POST /v1/chat/completions."""

    model_config = pydantic.ConfigDict(extra="allow")

    messages: list[Any]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None
    sse_ping_interval: float | None = pydantic.Field(None, ge=0.05)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, default_max_tokens: int | None) -> SamplingParams:
        """Raises InvalidRequestError naming the field. None is a field that was not sent."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            # vLLM's clients say -1 for no limit.
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
        }
        asked = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            max_tokens=asked if asked is not None else default_max_tokens,
        )

    def template_options(self) -> dict[str, Any]:
        options = dict(self.chat_template_kwargs or {})
        for reserved in ("messages", "add_generation_prompt", "bos_token", "eos_token"):
            if reserved in options:
                raise InvalidRequestError(f"chat_template_kwargs must not set {reserved}.", param="chat_template_kwargs")
        if self.enable_thinking is not None:
            options["enable_thinking"] = self.enable_thinking
        if self.add_generation_prompt is not None:
            options["add_generation_prompt"] = self.add_generation_prompt
        return options


class TokenizeRequest(pydantic.BaseModel):
    """Body of POST /tokenize, vLLM's shape: a prompt, or messages that go through the chat template."""

    model_config = pydantic.ConfigDict(extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(pydantic.BaseModel):
    """Body of POST /detokenize."""

    model_config = pydantic.ConfigDict(extra="allow")

    model: str | None = None
    tokens: list[int]


_Body = TypeVar("_Body", bound=pydantic.BaseModel)


def parse(kind: type[_Body], body: bytes) -> _Body:
    """Raises InvalidRequestError; param names the field."""
    try:
        return kind.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(f"{where}: {first['msg']}" if where else first["msg"], param=where.split(".")[0] or None) from None


def parse_chat_request(body: bytes) -> ChatRequest:
    """Raises InvalidRequestError (param names the field) and UnsupportedParameterError."""
    request = parse(ChatRequest, body)
    for name, value in (request.model_extra or {}).items():
        neutral = _NEUTRAL.get(name)
        if neutral is not None:
            if value is not None and not neutral(value):
                raise UnsupportedParameterError(f"{name} is not supported with this value.", param=name)
        elif name not in _IGNORED:
            logger.info("request field %r is not known and has no effect", name[:100])
    return request
