"""What a request may say, and which of it is honoured.

Three kinds of fields: honoured; refused by name where they ask for something that is not there yet (a neutral value passes); and accepted
without effect, which is what clients send for other services. A key that nobody knows is accepted too, with one line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import pydantic

from zen_turbo.engine.request import MAX_LOGPROBS, SamplingParams
from zen_turbo.errors import InvalidRequestError, UnsupportedParameterError
from zen_turbo.server.structured import response_format_rule, structured_outputs_rule

logger = logging.getLogger("zen_turbo.server")

MAX_CHOICES = 128

_IGNORED = frozenset(
    """user metadata store service_tier prompt_cache_key prompt_cache_retention safety_identifier verbosity cache_prompt timings_per_token
    priority""".split()
)

# Field -> whether its value asks for nothing.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "best_of": lambda value: value == 1,
    "prompt_logprobs": lambda value: value == 0,
    "truncate_prompt_tokens": lambda value: False,
    "cache_salt": lambda value: False,  # it asks for a separation of caches, which must not be promised in silence
    "return_token_ids": lambda value: value is False,
    "use_beam_search": lambda value: value is False,
    "bad_words": lambda value: value == [],
    "grammar": lambda value: value == "",
    "guided_grammar": lambda value: False,
    "structural_tag": lambda value: False,
}


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    include_usage: bool = False


class GenerationRequest(pydantic.BaseModel):
    """What the bodies of all routes that generate have in common."""

    model_config = pydantic.ConfigDict(extra="allow")
    neutral: ClassVar[Mapping[str, Callable[[Any], bool]]] = _NEUTRAL
    ignored: ClassVar[frozenset[str]] = _IGNORED

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    stream: bool | None = None
    sse_ping_interval: float | None = pydantic.Field(None, ge=0.05)

    def sampling(self, *, max_tokens: int | None, **more: Any) -> SamplingParams:
        """``more``: what a route adds. Raises InvalidRequestError naming the field. None is a field that was not sent."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            # vLLM's clients say -1 for no limit.
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "skip_special_tokens": self.skip_special_tokens,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            **more,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None}, max_tokens=max_tokens)


class ChoicesRequest(GenerationRequest):
    """What the bodies of chat and completions have in common."""

    n: int | None = pydantic.Field(None, ge=1, le=MAX_CHOICES)
    response_format: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def rule(self) -> tuple[str, str] | None:
        """The grammar's part that the answer must follow, and the field that asks for it; None where the answer is free.

        Raises InvalidRequestError, also where two fields ask, and UnsupportedParameterError.
        """
        vllm = {
            "structured_outputs": self.structured_outputs or {},
            "guided_json": {"json": self.guided_json},
            "guided_regex": {"regex": self.guided_regex},
            "guided_choice": {"choice": self.guided_choice},
        }
        rules = {name: structured_outputs_rule(value, param=name) for name, value in vllm.items()}
        if self.response_format is not None:
            rules["response_format"] = response_format_rule(self.response_format)
        found = [(rule, name) for name, rule in rules.items() if rule is not None]
        if len(found) > 1:
            raise InvalidRequestError(f"An answer has one shape, and {found[0][1]} asks for one already.", param=found[1][1])
        return found[0] if found else None


class ChatRequest(ChoicesRequest):
    """Body of POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, Callable[[Any], bool]]] = {
        **_NEUTRAL,
        "functions": lambda value: value == [],
        "function_call": lambda value: value in ("none", "auto"),
        "modalities": lambda value: value == ["text"],
        "audio": lambda value: False,
        "prediction": lambda value: False,
        "web_search_options": lambda value: False,
        "chat_template": lambda value: False,
        "echo": lambda value: value is False,
    }

    messages: list[Any]
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def continues(self) -> bool:
        """Whether the model goes on with the last message. One of the assistant at the end is gone on with unless the request says otherwise:
        there is nothing else to say after it."""
        if self.continue_final_message is not None:
            return self.continue_final_message
        last = self.messages[-1] if self.messages else None
        return self.add_generation_prompt is None and isinstance(last, dict) and last.get("role") == "assistant" and not last.get("tool_calls")

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives with each token; None where no logprobs are wanted. Raises InvalidRequestError."""
        if not self.logprobs:
            if self.top_logprobs:
                raise InvalidRequestError("top_logprobs needs logprobs true.", param="top_logprobs")
            return None
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise InvalidRequestError(f"top_logprobs must be between 0 and {MAX_LOGPROBS}, not {self.top_logprobs}.", param="top_logprobs")
        return self.top_logprobs or 0

    def template_options(self) -> dict[str, Any]:
        options = dict(self.chat_template_kwargs or {})
        for reserved in ("messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"):
            if reserved in options:
                raise InvalidRequestError(f"chat_template_kwargs must not set {reserved}.", param="chat_template_kwargs")
        if self.reasoning_effort is not None:
            options.setdefault("reasoning_effort", self.reasoning_effort)
            if self.reasoning_effort == "none":
                options.setdefault("enable_thinking", False)
        if self.enable_thinking is not None:
            options["enable_thinking"] = self.enable_thinking
        options["continue_final_message"] = self.continues
        options["add_generation_prompt"] = not self.continues if self.add_generation_prompt is None else self.add_generation_prompt
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
_Generation = TypeVar("_Generation", bound=GenerationRequest)


def parse(kind: type[_Body], body: bytes) -> _Body:
    """Raises InvalidRequestError; param names the field."""
    return _or_refusal(lambda: kind.model_validate_json(body))


def validated(kind: type[_Body], values: dict[str, Any]) -> _Body:
    """The same from values that were parsed before."""
    return _or_refusal(lambda: kind.model_validate(values))


def _or_refusal(validate: Callable[[], _Body]) -> _Body:
    try:
        return validate()
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(f"{where}: {first['msg']}" if where else first["msg"], param=where.split(".")[0] or None) from None


def parse_generation(kind: type[_Generation], body: bytes) -> _Generation:
    """Raises InvalidRequestError (param names the field) and UnsupportedParameterError."""
    request = parse(kind, body)
    for name, value in (request.model_extra or {}).items():
        neutral = kind.neutral.get(name)
        if neutral is not None:
            if value is not None and not neutral(value):
                raise UnsupportedParameterError(f"{name} is not supported with this value.", param=name)
        elif name not in kind.ignored:
            logger.info("request field %r is not known and has no effect", name[:100])
    return request
