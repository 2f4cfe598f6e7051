"""Messages to token ids through the checkpoint's own chat template.

Templates are programs from strangers, so they run in jinja2's immutable sandbox, set up as transformers does. A template sees placeholders in
place of the messages' contents, and the contents are put back afterwards: special tokens are parsed only in what the template wrote, and a
megabyte of document does not pass through template filters. Where the template changes contents (it may trim them), the result is compared
with a rendering of the real contents; if no faithful splice exists and a content holds the text of a special token, the request is refused.
The same holds for every other string that a request brings (tool definitions, arguments of calls), of which only those are replaced that hold
such a text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox

from zen_turbo.errors import EmptyPromptError, InvalidRequestError, UnsupportedModelError, shown
from zen_turbo.text.tokenizer import Tokenizer
from zen_turbo.text.tokenizer_source import TokenizerSource
from zen_turbo.text.tools import ToolForm, form_of

ROLES = ("system", "developer", "user", "assistant", "tool")


class TemplateError(jinja2.TemplateError):
    """What a template raises through raise_exception."""


class ChatTemplate:
    """A compiled template. ``template`` None means that the checkpoint has none; chatting is then an UnsupportedModelError.

    ``takes_tools``: whether it shows the model tool definitions; ``tool_form``: how the model then writes calls, if that is known; ``thinks``:
    whether it knows of thoughts that end with </think>.
    """

    def __init__(self, template: str | None, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        environment = _environment()
        self._template = environment.from_string(template) if template is not None else None
        self.takes_tools = template is not None and "tools" in jinja2.meta.find_undeclared_variables(environment.parse(template))
        self.tool_form: ToolForm | None = form_of(template) if template is not None and self.takes_tools else None
        self.thinks = template is not None and "</think>" in template

    def render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """The prompt as text, as transformers renders it."""
        return self._render(_checked(messages), add_generation_prompt, kwargs)

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt as token ids. ``continue_final_message``: end inside the last message, so that the model goes on with it.

        Raises InvalidRequestError (param "messages") for messages the template or we do not accept.
        """
        checked = _checked(messages)
        if continue_final_message and (add_generation_prompt or checked[-1]["role"] != "assistant"):
            raise InvalidRequestError(
                "continue_final_message needs a last message of the assistant and add_generation_prompt false.", param="continue_final_message"
            )
        contents = [message["content"] for message in checked]
        rendered = self._render(checked, add_generation_prompt, kwargs)
        others = _Others(self._tokenizer.special_tokens)
        masked_messages = [others.masked({**message, "content": ""}) for message in checked]
        masked_kwargs = others.masked(kwargs)
        # A placeholder that no text contains.
        stem = "\ue000content"
        while stem in rendered:
            stem += "\ue000"
        names = [f"{stem}{index}\ue001" for index in range(len(contents))]
        other_names = [f"{stem}{index}\ue002" for index in range(len(others.texts))]
        for message, name in zip(masked_messages, names, strict=True):
            message["content"] = name
        masked = self._render(others.named(masked_messages, other_names), add_generation_prompt, others.named(masked_kwargs, other_names))
        last = masked.rfind(names[-1])
        if continue_final_message and last < 0:
            raise InvalidRequestError("The model's chat template does not show the final message, so it cannot be continued.", param="messages")
        for content in (contents, [content.strip() for content in contents]):
            for other in (others.texts, [json.dumps(text, ensure_ascii=False)[1:-1] for text in others.texts])[: 1 + bool(others.texts)]:
                replaced = [*names, *other_names], [*content, *other]
                if "".join(text for text, _ in _splice(masked, *replaced)) == rendered:
                    end = last + len(names[-1]) if continue_final_message else len(masked)
                    return self._encode_pieces(_splice(masked[:end], *replaced))
        if others.texts or any(special in content for content in contents for special in self._tokenizer.special_tokens):
            raise InvalidRequestError(
                "A message or tool contains the text of a special token, and this model's chat template changes it in a way that would let "
                "it act as one.",
                param="messages",
            )
        if continue_final_message:
            final = contents[-1].strip()
            rendered = rendered[: rendered.rindex(final) + len(final)] if final and final in rendered else rendered
        return self._tokenizer.encode(rendered, allow_special=True)

    def _encode_pieces(self, pieces: list[tuple[str, bool]]) -> list[int]:
        """pieces: (text, whether the template wrote it). Ordinary text between two special tokens is encoded as one run, so that tokens
        are those of the whole string."""
        ids: list[int] = []
        run: list[str] = []

        def flush() -> None:
            if run:
                ids.extend(self._tokenizer.encode("".join(run)))
                run.clear()

        for text, from_template in pieces:
            for part, special_id in self._tokenizer.split_special(text) if from_template else [(text, None)]:
                if special_id is None:
                    run.append(part)
                else:
                    flush()
                    ids.append(special_id)
        flush()
        return ids

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, kwargs: dict[str, Any]) -> str:
        if self._template is None:
            raise UnsupportedModelError("This checkpoint has no chat template; use plain text completion.")
        tokenizer = self._tokenizer
        eos = tokenizer.eos_token_ids[0] if tokenizer.eos_token_ids else None
        values = {
            "bos_token": tokenizer.token_text(tokenizer.bos_token_id),
            "eos_token": tokenizer.token_text(eos),
            **kwargs,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except jinja2.TemplateError as error:
            raise InvalidRequestError(f"The model's chat template refuses these messages: {error}.", param="messages") from error


def load_chat_template(source: TokenizerSource, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that came with the tokenizer. Raises UnsupportedModelError if it does not compile."""
    try:
        return ChatTemplate(tokenizer.chat_template, tokenizer)
    except jinja2.TemplateError as error:
        raise UnsupportedModelError(f"The chat template of this {source.kind} checkpoint does not compile: {error}.") from error


def _splice(masked: str, names: list[str], contents: list[str]) -> list[tuple[str, bool]]:
    """Cut ``masked`` at placeholders and put contents in. A placeholder may occur any number of times."""
    pieces: list[tuple[str, bool]] = [(masked, True)]
    for name, content in zip(names, contents, strict=True):
        cut: list[tuple[str, bool]] = []
        for text, from_template in pieces:
            if not from_template:
                cut.append((text, False))
                continue
            parts = text.split(name)
            for index, part in enumerate(parts):
                cut += [(content, False)] if index else []
                cut.append((part, True))
        pieces = cut
    return [piece for piece in pieces if piece[0]]


def _checked(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with plain string contents. Raises InvalidRequestError naming the message, EmptyPromptError."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidRequestError("messages must be a list.", param="messages")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise InvalidRequestError(f"{where}: role must be one of {', '.join(ROLES)}, not {shown(role)}.", param="messages")
        checked = {**message, "content": _text_of(message.get("content"), where)}
        if message.get("tool_calls"):
            checked["tool_calls"] = [_call_with_mapping(call, where) for call in _list_of(message["tool_calls"], where)]
        elif "tool_calls" in checked:
            del checked["tool_calls"]  # null or empty, which templates would take for calls
        result.append(checked)
    if not any(message["content"] for message in result):
        raise EmptyPromptError("The messages hold no text.", param="messages")
    return result


def _list_of(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequestError(f"{where}: tool_calls must be a list.", param="messages")
    return value


def _call_with_mapping(call: Any, where: str) -> dict[str, Any]:
    """A call as templates want it: OpenAI's arguments are JSON in a string, and templates print a mapping as JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{where}: a tool call needs function.name.", param="messages")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequestError(f"{where}: arguments of the call of {function['name'][:100]!r} are not a JSON object.", param="messages")
    return {**call, "function": {**function, "arguments": arguments}}


class _Hidden(int):
    """Stands for string number ``self`` of _Others until it has a name."""


class _Others:
    """Strings outside of contents that hold the text of a special token; they get placeholders as contents do."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        self._special = tuple(special_tokens)
        self.texts: list[str] = []

    def masked(self, value: Any) -> Any:
        if isinstance(value, str) and any(special in value for special in self._special):
            self.texts.append(value)
            return _Hidden(len(self.texts) - 1)
        if isinstance(value, Mapping):
            for key in value:
                if isinstance(self.masked(key), _Hidden):
                    raise InvalidRequestError(f"The key {key[:100]!r} contains the text of a special token.", param="messages")
            return {key: self.masked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.masked(item) for item in value]
        return value

    def named(self, value: Any, names: Sequence[str]) -> Any:
        """What ``masked`` gave, with names in place of the strings."""
        if isinstance(value, _Hidden):
            return names[value]
        if isinstance(value, dict):
            return {key: self.named(item, names) for key, item in value.items()}
        if isinstance(value, list):
            return [self.named(item, names) for item in value]
        return value


def _text_of(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}: content must be a string or a list of parts.", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            raise InvalidRequestError(f"{where}: content part of type {shown(kind)} is not supported (text is).", param="messages")
        texts.append(part["text"])
    return "".join(texts)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
