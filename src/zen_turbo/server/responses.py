"""POST /v1/responses: OpenAI's newer shape, as an adapter over chat. Items become messages, and pieces of the answer become output items.

Nothing is stored: ``store`` is accepted, and asking for a response by its id is answered with 404. What would need a store
(``previous_response_id``, ``conversation``, ``background``) is refused by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pydantic
from fastapi import FastAPI, Request, Response

from zen_turbo.engine.request import Event, Finished, PrefillProgress, RequestOutput, TokenDelta
from zen_turbo.errors import InvalidRequestError, ZenTurboError
from zen_turbo.server import answering
from zen_turbo.server.answering import named, sse
from zen_turbo.server.chat import Admitted, Choice, Expand, admit
from zen_turbo.server.errors import error_body
from zen_turbo.server.schemas import ChatRequest, GenerationRequest, parse_generation, validated
from zen_turbo.server.served import ServedModel
from zen_turbo.server.usage import extras, usage
from zen_turbo.text.answer import AnswerForm, Thought
from zen_turbo.text.tools import CallArguments, CallStart, Piece, Text

_NAMES = {"messages": "input", "response_format": "text", "max_tokens": "max_output_tokens", "reasoning_effort": "reasoning"}


class NotStoredError(ZenTurboError):
    """A response is asked for after it was sent."""

    code = "response_not_found"
    http_status = 404


class ResponsesRequest(GenerationRequest):
    """Body of POST /v1/responses."""

    ignored: ClassVar[frozenset[str]] = GenerationRequest.ignored | {"include", "stream_options"}
    neutral: ClassVar[Mapping[str, Callable[[Any], bool]]] = {
        **GenerationRequest.neutral,
        "previous_response_id": lambda value: False,
        "conversation": lambda value: False,
        "background": lambda value: value is False,
        "prompt": lambda value: False,
        "truncation": lambda value: value == "disabled",
        "top_logprobs": lambda value: value == 0,
        "max_tool_calls": lambda value: False,
        "n": lambda value: value == 1,
        "return_progress": lambda value: value is False,
    }

    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = pydantic.Field(None, ge=1)
    text: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None

    def as_messages(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The conversation, and where in this body each of its messages is. Raises InvalidRequestError (param input)."""
        messages, places = ([{"role": "user", "content": self.input}], ["input"]) if isinstance(self.input, str) else messages_of(self.input)
        if not self.instructions:
            return messages, places
        return [{"role": "system", "content": self.instructions}, *messages], ["instructions", *places]

    def as_chat(self, messages: list[dict[str, Any]]) -> ChatRequest:
        """Raises InvalidRequestError and UnsupportedParameterError with this body's names."""
        shared = {name: getattr(self, name) for name in GenerationRequest.model_fields}
        more = {
            "messages": messages,
            "max_tokens": self.max_output_tokens,
            "response_format": _response_format(self.text),
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": _chat_tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": (self.reasoning or {}).get("effort"),
            "chat_template_kwargs": self.chat_template_kwargs,
            "enable_thinking": self.enable_thinking,
        }
        return validated(ChatRequest, {**shared, **more})


def messages_of(items: list[Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Input items as chat messages, and of each message the place of the item that began it; the calls of one turn belong to one message. Raises
    InvalidRequestError (param input)."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []

    def add(message: dict[str, Any]) -> None:
        messages.append(message)
        places.append(place)

    def assistant() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            add({"role": "assistant", "content": ""})
        return messages[-1]

    for index, item in enumerate(items):
        place = f"input[{index}]"
        kind = item.get("type", "message") if isinstance(item, Mapping) else type(item).__name__
        if kind == "message":
            content = item.get("content")
            if messages and messages[-1].get("content") == "" and item.get("role") == messages[-1]["role"] == "assistant":
                messages[-1]["content"] = content  # thoughts or calls came before it
            else:
                add({"role": item.get("role"), "content": content})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            assistant().setdefault("tool_calls", []).append({"id": item.get("call_id"), "type": "function", "function": function})
        elif kind == "function_call_output":
            add({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind == "reasoning":
            parts = item.get("content") or []
            thought = "".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))
            if thought:
                add({"role": "assistant", "content": "", "reasoning_content": thought})
        else:
            raise InvalidRequestError(f"{place}: an item of type {str(kind)[:100]!r} is not supported.", param="input")
    return messages, places


@contextlib.contextmanager
def _placed(places: Sequence[str]) -> Iterator[None]:
    """Errors that count messages leave with the place in this body. A message of several items is at the first of them."""
    try:
        yield
    except ZenTurboError as error:
        error.message = re.sub(r"^messages\[(\d+)\]", lambda found: places[int(found[1])], error.message)
        error.args = (error.message,)
        raise


def _response_format(text: Mapping[str, Any] | None) -> dict[str, Any] | None:
    form = (text or {}).get("format")
    if form is None:
        return None
    if not isinstance(form, Mapping):
        raise InvalidRequestError("text.format must be an object.", param="text")
    return {"type": "json_schema", "json_schema": dict(form)} if form.get("type") == "json_schema" else dict(form)


def _chat_tool(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        return tool  # refused by name where chat's tools are checked
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type" and value is not None}}


def _chat_tool_choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def install(app: FastAPI, served: ServedModel, expand: Expand) -> None:
    """expand: puts the text of files in place of what refers to them."""

    async def answer(request: Request) -> Response:
        response_id = f"resp_{uuid.uuid4().hex}"
        asked, admitted = await asyncio.to_thread(admit_body, await request.body(), response_id)
        writer = ResponseWriter(asked, admitted.form, response_id=response_id, model=served.name)
        return await answering.respond(request, served, asked, admitted.streams, writer)

    def admit_body(body: bytes, response_id: str) -> tuple[ResponsesRequest, Admitted]:
        asked = parse_generation(ResponsesRequest, body)
        with named(**_NAMES):
            messages, places = asked.as_messages()
            with _placed(places):
                return asked, admit(served, asked.as_chat(messages), response_id, expand)

    answering.post(app, "/v1/responses", answer)

    @app.get("/v1/responses/{response_id}")
    @app.delete("/v1/responses/{response_id}")
    @app.get("/v1/responses/{response_id}/input_items")
    @app.post("/v1/responses/{response_id}/cancel")
    async def stored(response_id: str) -> Response:
        raise NotStoredError("Responses are not stored here; each is sent once, by the request that created it.", param="response_id")


class ResponseWriter:
    """Builds the response object item by item, with the events that say so; see ``answering.Writer``."""

    def __init__(self, asked: ResponsesRequest, form: AnswerForm, *, response_id: str, model: str) -> None:
        self._choice = Choice(form)
        self._sequence = 0
        self._item: dict[str, Any] | None = None
        self._output: list[dict[str, Any]] = []
        self._head: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": (asked.model_extra or {}).get("metadata") or {},
            "model": model,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (asked.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def begin(self) -> list[bytes]:
        return [self._event(f"response.{name}", response=self._response()) for name in ("created", "in_progress")]

    def take(self, choice: int, event: Event) -> list[bytes]:
        if isinstance(event, PrefillProgress):
            return []
        if isinstance(event, TokenDelta):
            return [part for piece in self._choice.push(event) for part in self._piece(piece)]
        assert isinstance(event, Finished)
        parts = [part for piece in self._choice.finish(event.output) for part in self._piece(piece)]
        parts += self._close("incomplete" if event.output.finish_reason == "length" else "completed")
        return [*parts, *self._finish(event.output)]

    def pause(self) -> list[bytes]:
        return [self._event("response.in_progress", response=self._response())]

    def fail(self, error: Exception) -> list[bytes]:
        facts = error_body(error)["error"]
        self._head |= {"status": "failed", "error": {"code": facts["code"], "message": facts["message"]}}
        return [self._event("response.failed", response=self._response())]

    def end(self) -> list[bytes]:
        return []

    def whole(self) -> dict[str, Any]:
        return self._response()

    def _response(self) -> dict[str, Any]:
        return {**self._head, "output": list(self._output)}

    def _event(self, kind: str, **facts: Any) -> bytes:
        self._sequence += 1
        return sse({"type": kind, "sequence_number": self._sequence - 1, **facts}, event=kind)

    def _finish(self, output: RequestOutput) -> list[bytes]:
        counted = usage([output], reasoning_tokens=self._choice.reasoning_tokens)
        self._head["usage"] = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"],
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": counted["completion_tokens_details"],
            "total_tokens": counted["total_tokens"],
        }
        self._head |= extras(output)
        if output.finish_reason == "length":
            self._head |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            self._head["status"] = "completed"
        # An answer of no text is an empty message.
        parts = [] if self._output else [*self._open_message(), *self._close("completed")]
        return [*parts, self._event(f"response.{self._head['status']}", response=self._response())]

    # Items. One is open at a time; the next piece of another kind closes it.

    def _piece(self, piece: Thought | Piece) -> list[bytes]:
        if isinstance(piece, Thought):
            return [*self._open_kind("reasoning"), *self._add_text("response.reasoning_text.delta", piece.text)]
        if isinstance(piece, Text):
            return [*self._open_kind("message"), *self._add_text("response.output_text.delta", piece.text)]
        if isinstance(piece, CallStart):
            item = {"type": "function_call", "call_id": self._choice.call_ids[piece.index], "name": piece.name, "arguments": ""}
            return [*self._close("completed"), *self._open("fc", item)]
        assert isinstance(piece, CallArguments) and self._item is not None
        self._item["arguments"] += piece.fragment
        return [self._event("response.function_call_arguments.delta", **self._where(), delta=piece.fragment)]

    def _open_kind(self, kind: str) -> list[bytes]:
        if self._item is not None and self._item["type"] == kind:
            return []
        return [*self._close("completed"), *(self._open_message() if kind == "message" else self._open_reasoning())]

    def _open_message(self) -> list[bytes]:
        parts = self._open("msg", {"type": "message", "role": "assistant", "content": []})
        return [*parts, *self._add_part({"type": "output_text", "text": "", "annotations": [], "logprobs": []})]

    def _open_reasoning(self) -> list[bytes]:
        parts = self._open("rs", {"type": "reasoning", "summary": [], "content": []})
        return [*parts, *self._add_part({"type": "reasoning_text", "text": ""})]

    def _open(self, prefix: str, item: dict[str, Any]) -> list[bytes]:
        self._item = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **item}
        return [self._event("response.output_item.added", output_index=len(self._output), item=self._item)]

    def _add_part(self, part: dict[str, Any]) -> list[bytes]:
        assert self._item is not None
        self._item["content"].append(part)
        return [self._event("response.content_part.added", **self._where(), content_index=0, part=part)]

    def _add_text(self, kind: str, text: str) -> list[bytes]:
        assert self._item is not None
        self._item["content"][0]["text"] += text
        logprobs = {"logprobs": []} if kind == "response.output_text.delta" else {}
        return [self._event(kind, **self._where(), content_index=0, delta=text, **logprobs)]

    def _close(self, status: Literal["completed", "incomplete"]) -> list[bytes]:
        if self._item is None:
            return []
        item, where = self._item, self._where()
        parts: list[bytes] = []
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            parts.append(self._event("response.function_call_arguments.done", **where, **done))
        else:
            part = item["content"][0]
            kind, logprobs = ("output_text", {"logprobs": []}) if item["type"] == "message" else ("reasoning_text", {})
            parts.append(self._event(f"response.{kind}.done", **where, content_index=0, text=part["text"], **logprobs))
            parts.append(self._event("response.content_part.done", **where, content_index=0, part=part))
        item["status"] = status
        parts.append(self._event("response.output_item.done", output_index=where["output_index"], item=item))
        self._output.append(item)
        self._item = None
        return parts

    def _where(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self._output)}
