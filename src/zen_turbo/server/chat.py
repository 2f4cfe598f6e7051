"""POST /v1/chat/completions: from a body to submitted requests, and from their events to OpenAI's objects."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response

from zen_turbo.engine.request import Event, Finished, PrefillProgress, RequestOutput, SamplingParams, TokenDelta, TokenLogprobs
from zen_turbo.engine.service import RequestStream
from zen_turbo.errors import UnsupportedParameterError
from zen_turbo.server import answering
from zen_turbo.server.answering import DONE, named, sse
from zen_turbo.server.errors import error_body
from zen_turbo.server.schemas import ChatRequest, parse_generation
from zen_turbo.server.served import ServedModel
from zen_turbo.server.structured import ToolUse, functions_of, grammar, tool_use
from zen_turbo.server.usage import extras, progress_facts, usage
from zen_turbo.text.answer import AnswerForm, AnswerReader, Thinking, Thought, thinking_at_end_of
from zen_turbo.text.tokenizer import Tokenizer
from zen_turbo.text.tools import CLOSE, CallArguments, CallStart, Piece, ToolForm

Expand = Callable[[list[Any]], list[Any]]
# Enough of a prompt's end to see how its last line opens the answer.
_PROMPT_END_TOKENS = 64


def install(app: FastAPI, served: ServedModel, expand: Expand) -> None:
    """expand: puts the text of files in place of what refers to them."""

    async def answer(request: Request) -> Response:
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        admitted = await asyncio.to_thread(admit_body, await request.body(), request_id)
        chat = admitted.chat
        writer = ChatWriter(
            request_id=request_id,
            model=served.name,
            form=admitted.form,
            tokenizer=served.engine.tokenizer,
            choices=len(admitted.streams),
            include_usage=chat.include_usage,
            return_progress=bool(chat.return_progress),
        )
        return await answering.respond(request, served, chat, admitted.streams, writer)

    def admit_body(body: bytes, request_id: str) -> Admitted:
        return admit(served, parse_generation(ChatRequest, body), request_id, expand)

    answering.post(app, "/v1/chat/completions", answer)


class Prompt(NamedTuple):
    """A body's messages with the text of their files, their tokens, and the tools that may be called."""

    messages: list[Any]
    token_ids: list[int]
    use: ToolUse


class Admitted(NamedTuple):
    chat: ChatRequest
    form: AnswerForm
    streams: list[RequestStream]


def prompt_of(served: ServedModel, chat: ChatRequest, expand: Expand) -> Prompt:
    """What the model is given. Raises ModelNotFoundError, InvalidRequestError, UnsupportedParameterError and what ``expand`` raises."""
    template = served.engine.chat_template
    served.check_model(chat.model)
    use = tool_use(functions_of(chat.tools or ()), chat.tool_choice)
    if chat.tools and not template.takes_tools:
        raise UnsupportedParameterError("This model's chat template knows no tools.", param="tools")
    if use.functions and template.tool_form is None:
        raise UnsupportedParameterError("How this model writes tool calls is not known here.", param="tools")
    # Also with tool_choice none: the prompt, and with it its cached pages, must not depend on the choice.
    tools = {"tools": chat.tools} if chat.tools else {}
    messages = expand(chat.messages)
    return Prompt(messages, template.encode(messages, **chat.template_options(), **tools), use)


def admit(served: ServedModel, chat: ChatRequest, request_id: str, expand: Expand) -> Admitted:
    """Everything that can be refused is refused here. Submits ``chat.n`` requests."""
    engine, template = served.engine, served.engine.chat_template
    served.check_answers(chat.n or 1, param="n")
    messages, prompt, use = prompt_of(served, chat, expand)
    thinking = Thinking.NONE
    if template.thinks:
        end = engine.tokenizer.decode(prompt[-_PROMPT_END_TOKENS:], skip_special_tokens=False)
        last = messages[-1].get("content")
        thinking = thinking_at_end_of(end, continued=last if chat.continues and isinstance(last, str) else None)
    form = AnswerForm(thinking, template.tool_form if use.functions else None, use.schemas)
    answer, source = chat.rule() or (None, "tools")
    sampling = _sampling(chat, served.default_max_tokens, form, engine.tokenizer)
    bound = grammar(
        answer,
        use,
        form.tool_form,
        one_call=chat.parallel_tool_calls is False,
        thinking=thinking,
        special_tokens=engine.tokenizer.special_tokens,
    )
    sampling = dataclasses.replace(sampling, grammar=bound)
    if chat.asked_max_tokens is None:
        sampling = shortened(sampling, engine.max_model_len - len(prompt))
    with named(grammar=source):
        if bound is not None:
            engine.guidance.matcher(bound)  # compiled here, where no other request waits for it
        streams = answering.submit_choices(served.service, prompt, sampling, n=chat.n or 1, request_id=request_id)
    return Admitted(chat, form, streams)


def _sampling(chat: ChatRequest, default_max_tokens: int | None, form: AnswerForm, tokenizer: Tokenizer) -> SamplingParams:
    more: dict[str, Any] = {"logprobs": chat.num_logprobs}
    if form.tool_form is not None and any(tag in tokenizer.special_tokens for tag in form.tool_form.tags):
        more["skip_special_tokens"] = False
    asked = chat.asked_max_tokens
    sampling = chat.sampling(max_tokens=asked if asked is not None else default_max_tokens, **more)
    if form.tool_form in (ToolForm.HERMES, ToolForm.QWEN_CODER) and chat.parallel_tool_calls is False:
        # After one call there is nothing to wait for; the parser needs no closing tag at the end.
        sampling = dataclasses.replace(sampling, stop=(*sampling.stop, CLOSE))
    return sampling


def shortened(sampling: SamplingParams, room: int) -> SamplingParams:
    """A default is not a wish: where the context ends earlier, so does the default."""
    if sampling.max_tokens is None or room >= sampling.max_tokens or room < 1:
        return sampling
    return dataclasses.replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


class Choice:
    """One answer as it comes."""

    def __init__(self, form: AnswerForm) -> None:
        self.reader = AnswerReader(form)
        self.call_ids: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.reasoning_tokens = 0
        self.output: RequestOutput | None = None

    def push(self, delta: TokenDelta) -> list[Thought | Piece]:
        self.logprobs += delta.logprobs
        thinking = self.reader.is_thinking
        pieces = self.reader.push(delta.text)
        if thinking or any(isinstance(piece, Thought) for piece in pieces):
            self.reasoning_tokens += len(delta.token_ids)
        return self._with_ids(pieces)

    def finish(self, output: RequestOutput) -> list[Thought | Piece]:
        self.output = output
        return self._with_ids(self.reader.flush())

    def _with_ids(self, pieces: list[Thought | Piece]) -> list[Thought | Piece]:
        self.call_ids += [f"call_{uuid.uuid4().hex[:24]}" for piece in pieces if isinstance(piece, CallStart)]
        return pieces

    @property
    def finish_reason(self) -> str:
        assert self.output is not None
        if self.output.finish_reason == "length":
            return "length"
        return "tool_calls" if self.reader.calls else "stop"


class ChatWriter:
    """The objects of one answer; see ``answering.Writer``."""

    def __init__(
        self,
        *,
        request_id: str,
        model: str,
        form: AnswerForm,
        tokenizer: Tokenizer,
        choices: int,
        include_usage: bool = False,
        return_progress: bool = False,
    ) -> None:
        self._head = {"id": request_id, "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._choices = [Choice(form) for _ in range(choices)]
        self._include_usage = include_usage
        self._return_progress = return_progress

    def begin(self) -> list[bytes]:
        return [self._chunk(choice, {"role": "assistant", "content": ""}) for choice in range(len(self._choices))]

    def take(self, choice: int, event: Event) -> list[bytes]:
        state = self._choices[choice]
        if isinstance(event, PrefillProgress):
            return [self._progress(event)] if self._return_progress and choice == 0 else []
        if isinstance(event, Finished):
            deltas = [_delta(piece, state.call_ids) for piece in state.finish(event.output)]
            chunks = [self._chunk(choice, delta) for delta in deltas]
            return [*chunks, self._chunk(choice, {}, state.finish_reason, **extras(event.output))]
        assert isinstance(event, TokenDelta)
        deltas = [_delta(piece, state.call_ids) for piece in state.push(event)]
        if event.logprobs and not deltas:
            deltas = [{"content": ""}]  # the text of this token is held back, its probability is not
        logprobs = [self._logprobs(event.logprobs) if event.logprobs and number == 0 else None for number in range(len(deltas))]
        return [self._chunk(choice, delta, logprobs=each) for delta, each in zip(deltas, logprobs, strict=True)]

    def pause(self) -> list[bytes]:
        return [self._chunk(0, {})]

    def fail(self, error: Exception) -> list[bytes]:
        return [sse(error_body(error)), DONE]

    def end(self) -> list[bytes]:
        whole = {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}
        return [*([sse(whole)] if self._include_usage else []), DONE]

    def whole(self) -> dict[str, Any]:
        outputs = self._outputs()
        choices = [self._whole_choice(number, state) for number, state in enumerate(self._choices)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage(), **extras(outputs[0])}

    def _whole_choice(self, number: int, state: Choice) -> dict[str, Any]:
        assert state.output is not None
        reader = state.reader
        reader.give_up_broken_calls(state.output.text)
        message: dict[str, Any] = {"role": "assistant", "content": reader.content, "refusal": None}
        if reader.reasoning:
            message["reasoning_content"] = reader.reasoning
        if reader.calls:
            message["content"] = reader.content or None
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call_id, call in zip(state.call_ids, reader.calls, strict=True)
            ]
        logprobs = self._logprobs(state.logprobs) if state.logprobs else None
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": state.finish_reason}

    def _chunk(
        self, choice: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict[str, Any] | None = None, **more: Any
    ) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        choices = [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}]
        return sse({**self._head, "object": "chat.completion.chunk", "choices": choices, **usage, **more})

    def _progress(self, event: PrefillProgress) -> bytes:
        return sse({**self._head, "object": "chat.completion.chunk", "choices": [], "prompt_progress": progress_facts(event)})

    def _logprobs(self, values: Sequence[TokenLogprobs]) -> dict[str, Any]:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            raw = self._tokenizer.token_bytes(token_id, skip_special_tokens=False)
            return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

        content = [
            {**entry(value.token_id, value.logprob), "top_logprobs": [entry(token_id, logprob) for token_id, logprob in value.top]}
            for value in values
        ]
        return {"content": content, "refusal": None}

    def _outputs(self) -> list[RequestOutput]:
        return [state.output for state in self._choices if state.output is not None]

    def _usage(self) -> dict[str, Any]:
        return usage(self._outputs(), reasoning_tokens=sum(state.reasoning_tokens for state in self._choices))


def _delta(piece: Thought | Piece, call_ids: Sequence[str]) -> dict[str, Any]:
    if isinstance(piece, Thought):
        return {"reasoning_content": piece.text}
    if isinstance(piece, CallStart):
        function = {"name": piece.name, "arguments": ""}
        return {"tool_calls": [{"index": piece.index, "id": call_ids[piece.index], "type": "function", "function": function}]}
    if isinstance(piece, CallArguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.fragment}}]}
    return {"content": piece.text}
