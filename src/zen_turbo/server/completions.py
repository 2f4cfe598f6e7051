"""POST /v1/completions: plain continuation of texts or token ids, OpenAI's older shape, with ``echo`` and log probabilities of the prompt, by
which evaluation programs score texts. The prompt is raw: the texts of special tokens in it are those tokens, since the caller is the template."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import pydantic
from fastapi import FastAPI, Request, Response

from zen_turbo.engine.request import Event, Finished, PrefillProgress, RequestOutput, TokenDelta, TokenLogprobs
from zen_turbo.engine.service import RequestStream
from zen_turbo.errors import InvalidRequestError, UnsupportedParameterError
from zen_turbo.server import answering
from zen_turbo.server.answering import DONE, named, sse
from zen_turbo.server.chat import shortened
from zen_turbo.server.errors import error_body
from zen_turbo.server.schemas import ChoicesRequest, parse_generation
from zen_turbo.server.served import ServedModel
from zen_turbo.server.structured import ToolUse, grammar
from zen_turbo.server.usage import extras, progress_facts, usage
from zen_turbo.text.answer import Thinking
from zen_turbo.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's for this route


class CompletionRequest(ChoicesRequest):
    """Body of POST /v1/completions."""

    neutral: ClassVar[Mapping[str, Callable[[Any], bool]]] = {
        **ChoicesRequest.neutral,
        "suffix": lambda value: value == "",
        "prompt_embeds": lambda value: False,
    }

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = pydantic.Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            return []
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]


class _Prompt(NamedTuple):
    text: str | None  # None: it came as token ids
    token_ids: list[int]


def install(app: FastAPI, served: ServedModel) -> None:
    async def answer(request: Request) -> Response:
        request_id = f"cmpl-{uuid.uuid4().hex}"
        asked, prompts, streams = await asyncio.to_thread(admit, await request.body(), request_id)
        writer = CompletionWriter(asked, prompts, request_id=request_id, model=served.name, tokenizer=served.engine.tokenizer)
        return await answering.respond(request, served, asked, streams, writer)

    def admit(body: bytes, request_id: str) -> tuple[CompletionRequest, list[_Prompt], list[RequestStream]]:
        engine = served.engine
        asked = parse_generation(CompletionRequest, body)
        served.check_model(asked.model)
        given, n = asked.prompts, asked.n or 1
        served.check_answers(len(given) * n, param="prompt")
        if asked.stream and asked.echo and asked.logprobs is not None:
            raise UnsupportedParameterError("echo with logprobs is not supported in a stream.", param="echo")
        prompts = [
            _Prompt(prompt, engine.tokenizer.encode(prompt, allow_special=True, add_special_tokens=asked.add_special_tokens))
            if isinstance(prompt, str)
            else _Prompt(None, prompt)
            for prompt in given
        ]
        asked_tokens = DEFAULT_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens
        if not asked_tokens and not asked.echo:
            raise InvalidRequestError("max_tokens 0 without echo asks for nothing.", param="max_tokens")
        sampling = asked.sampling(max_tokens=asked_tokens, logprobs=asked.logprobs, prompt_logprobs=asked.logprobs if asked.echo else None)
        rule, source = asked.rule() or (None, "")
        special = engine.tokenizer.special_tokens
        bound = grammar(rule, ToolUse(), None, one_call=False, thinking=Thinking.NONE, special_tokens=special)
        sampling = dataclasses.replace(sampling, grammar=bound)
        streams: list[RequestStream] = []
        try:
            with named(grammar=source, messages="prompt"):
                if bound is not None:
                    engine.guidance.matcher(bound)  # compiled here, where no other request waits for it
                for number, prompt in enumerate(prompts):
                    room = engine.max_model_len - len(prompt.token_ids)
                    own = sampling if asked.max_tokens is not None else shortened(sampling, room)
                    own_id = request_id if len(prompts) == 1 else f"{request_id}-{number}"
                    streams += answering.submit_choices(served.service, prompt.token_ids, own, n=n, request_id=own_id)
        except BaseException:
            answering.cancel_all(streams)
            raise
        return asked, prompts, streams

    answering.post(app, "/v1/completions", answer)


class _Choice:
    """One answer as it comes, and at which character each of its tokens begins."""

    def __init__(self, prompt: _Prompt, tokenizer: Tokenizer, *, echo: bool, skip_special_tokens: bool) -> None:
        self.prompt = prompt
        self.echoed = ""
        if echo:
            self.echoed = prompt.text if prompt.text is not None else tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        self.logprobs: list[TokenLogprobs] = []
        self.offsets: list[int] = []
        self.output: RequestOutput | None = None
        self._at = len(self.echoed)
        self._decoder = tokenizer.incremental(skip_special_tokens=skip_special_tokens)

    def add(self, values: Sequence[TokenLogprobs]) -> list[int]:
        """Keep the next tokens of the answer; returns where they begin."""
        offsets = []
        for value in values:
            offsets.append(self._at)
            self._at += len(self._decoder.push(value.token_id))
        self.logprobs += values
        self.offsets += offsets
        return offsets


class CompletionWriter:
    """The objects of one answer; see ``answering.Writer``."""

    def __init__(self, asked: CompletionRequest, prompts: Sequence[_Prompt], *, request_id: str, model: str, tokenizer: Tokenizer) -> None:
        self._head = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._num_prompts = len(prompts)
        self._echo = bool(asked.echo)
        self._wants_logprobs = asked.logprobs is not None
        self._include_usage = asked.include_usage
        self._return_progress = bool(asked.return_progress)
        skip = asked.skip_special_tokens is not False
        self._choices = [
            _Choice(prompt, tokenizer, echo=self._echo, skip_special_tokens=skip) for prompt in prompts for _ in range(asked.n or 1)
        ]

    def begin(self) -> list[bytes]:
        return [self._chunk(choice, state.echoed) for choice, state in enumerate(self._choices) if self._echo]

    def take(self, choice: int, event: Event) -> list[bytes]:
        state = self._choices[choice]
        if isinstance(event, PrefillProgress):
            return [self._progress(event)] if self._return_progress and choice == 0 else []
        if isinstance(event, Finished):
            state.output = event.output
            return [self._chunk(choice, "", finish_reason=_finish_reason(event.output), **extras(event.output))]
        assert isinstance(event, TokenDelta)
        offsets = state.add(event.logprobs)
        if not offsets:
            return [self._chunk(choice, event.text)] if event.text else []
        return [self._chunk(choice, event.text, self._logprobs(event.logprobs, offsets))]

    def pause(self) -> list[bytes]:
        return [self._chunk(0, "")]

    def fail(self, error: Exception) -> list[bytes]:
        return [sse(error_body(error)), DONE]

    def end(self) -> list[bytes]:
        return [*([sse({**self._head, "choices": [], "usage": self._usage()})] if self._include_usage else []), DONE]

    def whole(self) -> dict[str, Any]:
        choices = []
        for number, state in enumerate(self._choices):
            assert state.output is not None
            logprobs = self._whole_logprobs(state, state.output) if self._wants_logprobs else None
            text = state.echoed + state.output.text
            choices.append({"index": number, "text": text, "logprobs": logprobs, "finish_reason": _finish_reason(state.output)})
        return {**self._head, "choices": choices, "usage": self._usage(), **extras(self._outputs()[0])}

    def _chunk(
        self, choice: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None, **more: Any
    ) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        choices = [{"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}]
        return sse({**self._head, "choices": choices, **usage, **more})

    def _progress(self, event: PrefillProgress) -> bytes:
        return sse({**self._head, "choices": [], "prompt_progress": progress_facts(event)})

    def _whole_logprobs(self, state: _Choice, output: RequestOutput) -> dict[str, Any]:
        """Of the prompt, if it is echoed, and the answer. Nothing precedes the prompt's first token, so nothing is said of it."""
        if output.prompt_logprobs is None:
            return self._logprobs(state.logprobs, state.offsets)
        offsets = self._prompt_offsets(state.prompt)
        found = self._logprobs([*output.prompt_logprobs, *state.logprobs], [*offsets[1:], *state.offsets])
        first = {"tokens": self._name(state.prompt.token_ids[0]), "token_logprobs": None, "top_logprobs": None, "text_offset": offsets[0]}
        return {key: [first[key], *values] for key, values in found.items()}

    def _prompt_offsets(self, prompt: _Prompt) -> list[int]:
        decoder = self._tokenizer.incremental(skip_special_tokens=False)
        offsets, at = [], 0
        for number, token_id in enumerate(prompt.token_ids):
            offsets.append(at)
            # A beginning-of-sequence token that we put in front is not part of the text.
            added = number == 0 and prompt.text is not None and not prompt.text.startswith(self._tokenizer.token_text(token_id))
            if not (added and token_id == self._tokenizer.bos_token_id):
                at += len(decoder.push(token_id))
        return offsets

    def _logprobs(self, values: Sequence[TokenLogprobs], offsets: Sequence[int]) -> dict[str, list[Any]]:
        return {
            "tokens": [self._name(value.token_id) for value in values],
            "token_logprobs": [value.logprob for value in values],
            # The token that stands there is named too if it is none of the likeliest; the likeliest go last to win where two have one name.
            "top_logprobs": [
                {self._name(token_id): logprob for token_id, logprob in ((value.token_id, value.logprob), *reversed(value.top))} for value in values
            ],
            "text_offset": list(offsets),
        }

    def _name(self, token_id: int) -> str:
        """A token's text, or its bytes where these are no text of their own."""
        raw = self._tokenizer.token_bytes(token_id, skip_special_tokens=False)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _outputs(self) -> list[RequestOutput]:
        return [state.output for state in self._choices if state.output is not None]

    def _usage(self) -> dict[str, Any]:
        return usage(self._outputs(), prompts=self._num_prompts)


def _finish_reason(output: RequestOutput) -> str:
    return "length" if output.finish_reason == "length" else "stop"
