"""Tool calls in what a model writes. Each family has a form of its own:

    hermes (Qwen2.5, Qwen3)      <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several in a row
    qwen_coder (Qwen3-Coder)     <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>
    llama (Llama 3)              {"name": ..., "parameters": {...}} as the whole answer, optionally after <|python_tag|>

A parser is fed an answer in any portions and gives back pieces: text, the beginning of a call, fragments of its arguments as JSON text. Text
that may turn out to be a call is held back; what turns out to be none is given back as text, a call of an unknown function included. A call
is begun as soon as its name is known, so arguments that end too early or are not JSON reach a stream as they are.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

OPEN, CLOSE, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
# Names are bounded, so that a header which is none is seen to be none.
_HEADER = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]{1,200})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FUNCTION = re.compile(r"\s*<function=([^>\s]{1,200})>")
_PARAMETER_END = "</parameter>"
_PARAMETER = re.compile(r"\s*<parameter=([^>]{1,200})>(.*?)" + _PARAMETER_END, re.DOTALL)
_FUNCTION_END = re.compile(r"\s*</function>")


class ToolForm(enum.Enum):
    HERMES = "hermes"
    QWEN_CODER = "qwen_coder"
    LLAMA = "llama"

    @property
    def tags(self) -> tuple[str, ...]:
        """Texts that must reach the parser, even where the vocabulary has them as special tokens."""
        return (PYTHON_TAG,) if self is ToolForm.LLAMA else (OPEN, CLOSE)


def form_of(template: str) -> ToolForm | None:
    """The form that a chat template teaches its model; None if it is none of these."""
    if "<function=" in template and "<parameter=" in template:
        return ToolForm.QWEN_CODER
    if OPEN in template:
        return ToolForm.HERMES
    if '"parameters"' in template and ("python_tag" in template or "ipython" in template):
        return ToolForm.LLAMA
    return None


class Text(NamedTuple):
    text: str


class CallStart(NamedTuple):
    index: int
    name: str


class CallArguments(NamedTuple):
    """A fragment of the JSON text of call ``index``."""

    index: int
    fragment: str


Piece = Text | CallStart | CallArguments


class JsonScanner:
    """Finds the end of a JSON object in text that arrives in portions; it does not judge what is inside."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> int | None:
        """Number of characters up to and with the closing brace; None while it has not come."""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None


class ToolCallParser:
    """tools: name -> JSON schema of the arguments, of the functions that may be called."""

    def __init__(self, form: ToolForm, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._form = form
        self._tools = tools
        self._held = ""
        self._state = self._text if form is not ToolForm.LLAMA else self._bare_call
        self._calls = 0
        self._scanner = JsonScanner()
        self._scanned = 0
        self._skipped = ""
        self._current = ""
        self._parameters = 0

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._state(pieces, False):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """The end of the answer: what was held back is a call that needed no end, or text."""
        pieces: list[Piece] = []
        while self._state(pieces, True):
            pass
        return pieces

    # States. Each takes what it can from the held text and says whether another should go on.

    def _text(self, pieces: list[Piece], end: bool) -> bool:
        """Ordinary text. White space waits for what follows: between calls and before the first it belongs to no one."""
        at = self._held.find(OPEN)
        if at >= 0:
            self._give(pieces, self._held[:at].rstrip())
            self._held = self._held[at + len(OPEN) :]
            self._state = self._tagged_call
            return True
        safe = len(self._held) if end else without_beginning(self._held, OPEN)
        shown = self._held[:safe] if end and not self._calls else self._held[:safe].rstrip()
        if self._calls and not shown.strip():
            shown = ""
        self._give(pieces, shown)
        self._held = "" if end else self._held[len(shown) :]
        return False

    def _tagged_call(self, pieces: list[Piece], end: bool) -> bool:
        """After the opening tag, before it is known what is called."""
        header = (_FUNCTION if self._form is ToolForm.QWEN_CODER else _HEADER).match(self._held)
        if header is not None and header[1] in self._tools:
            self._begin(pieces, header[1])
            self._held = self._held[header.end() :]
            self._state = self._coder_parameters if self._form is ToolForm.QWEN_CODER else self._json_arguments
            return True
        at = self._held.find(CLOSE, max(0, self._scanned - len(CLOSE)))
        self._scanned = len(self._held)
        if at < 0 and not end:
            return False
        block, closed = (self._held[:at], True) if at >= 0 else (self._held, False)
        self._held = self._held[at + len(CLOSE) :] if closed else ""
        self._scanned = 0
        if self._form is ToolForm.QWEN_CODER or not self._whole_call(pieces, block):
            self._give(pieces, OPEN + block + (CLOSE if closed else ""))
        self._state = self._text
        return closed

    def _json_arguments(self, pieces: list[Piece], end: bool) -> bool:
        length = self._scanner.push(self._held)
        self._argue(pieces, self._held if length is None else self._held[:length])
        self._held = "" if length is None else self._held[length:]
        if length is None:
            return False
        self._state = self._call_end if self._form is ToolForm.HERMES else self._bare_call_end
        return True

    def _call_end(self, pieces: list[Piece], end: bool) -> bool:
        """After the arguments: what stands between them and the closing tag says nothing."""
        at = self._held.find(CLOSE)
        if at < 0:
            self._held = "" if end else self._held[without_beginning(self._held, CLOSE) :]
            return False
        self._held = self._held[at + len(CLOSE) :]
        self._state = self._text
        return True

    def _coder_parameters(self, pieces: list[Piece], end: bool) -> bool:
        parameter = _PARAMETER.match(self._held) if _PARAMETER_END in self._held else None
        if parameter is not None:
            name = self._current
            properties = self._tools[name].get("properties")
            schema = properties.get(parameter[1]) if isinstance(properties, Mapping) else None
            value = _typed(parameter[2].removeprefix("\n").removesuffix("\n"), schema)
            lead = ", " if self._parameters else "{"
            self._argue(pieces, lead + json.dumps(parameter[1], ensure_ascii=False) + ": " + json.dumps(value, ensure_ascii=False))
            self._parameters += 1
            self._held = self._held[parameter.end() :]
            return True
        over = _FUNCTION_END.match(self._held)
        if over is None:
            return False
        self._argue(pieces, "}" if self._parameters else "{}")
        self._held = self._held[over.end() :]
        self._state = self._call_end
        return True

    def _bare_call(self, pieces: list[Piece], end: bool) -> bool:
        """The beginning of an answer, or what follows a call: JSON here may be a call, and anything else is text."""
        text = self._held.lstrip(" \n;" if self._calls else None)
        if text.startswith(PYTHON_TAG):
            text = text[len(PYTHON_TAG) :].lstrip()
        elif not end and (not text or PYTHON_TAG.startswith(text)):
            return False
        if not text.startswith("{"):
            if self._calls and not text.strip():
                self._held = ""
            if not text and not end:
                return False
            self._give(pieces, self._held)
            self._held = ""
            self._state = self._plain
            return False
        self._skipped, self._held = self._held[: len(self._held) - len(text)], text
        self._scanner, self._scanned = JsonScanner(), 0
        self._state = self._bare_object
        return True

    def _bare_object(self, pieces: list[Piece], end: bool) -> bool:
        """JSON that may be a call."""
        header = _HEADER.match(self._held)
        if header is not None and header[1] in self._tools:
            self._begin(pieces, header[1])
            self._held = self._held[header.end() :]
            self._state = self._json_arguments
            return True
        length = self._scanner.push(self._held[self._scanned :])
        length, self._scanned = None if length is None else self._scanned + length, len(self._held)
        if length is None and not end:
            return False
        if length is not None and self._whole_call(pieces, self._held[:length]):
            self._held = self._held[length:]
            self._state = self._bare_call
            return True
        self._give(pieces, self._skipped + self._held)
        self._held = ""
        self._state = self._plain
        return False

    def _bare_call_end(self, pieces: list[Piece], end: bool) -> bool:
        """The brace that closes a call whose arguments are over."""
        text = self._held.lstrip()
        self._held = text.removeprefix("}")
        if not text:
            return False
        self._state = self._bare_call
        return True

    def _plain(self, pieces: list[Piece], end: bool) -> bool:
        self._give(pieces, self._held)
        self._held = ""
        return False

    # What they have in common.

    def _give(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append(Text(text))

    def _begin(self, pieces: list[Piece], name: str) -> None:
        self._current = name
        self._scanner, self._scanned, self._parameters = JsonScanner(), 0, 0
        pieces.append(CallStart(self._calls, name))
        self._calls += 1

    def _argue(self, pieces: list[Piece], fragment: str) -> None:
        if fragment:
            pieces.append(CallArguments(self._calls - 1, fragment))

    def _whole_call(self, pieces: list[Piece], block: str) -> bool:
        """A call in JSON whose parts come in another order, or without arguments, or with arguments as a string of JSON."""
        try:
            call = json.loads(block)
            arguments = call.get("arguments", call.get("parameters", {}))
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            known = call.get("name") in self._tools
        except (ValueError, AttributeError, TypeError, RecursionError):
            return False
        if not known or not isinstance(arguments, dict):
            return False
        self._begin(pieces, call["name"])
        self._argue(pieces, json.dumps(arguments, ensure_ascii=False))
        return True


def without_beginning(text: str, tag: str) -> int:
    """Length of ``text`` without the longest suffix that may begin ``tag``."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return len(text) - length
    return len(text)


def _typed(text: str, schema: Any) -> Any:
    """The value that a parameter's text stands for: a string where the schema wants one, else JSON if it is JSON."""
    types = _types(schema)
    if types == {"string"}:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if "string" not in types:
        return value
    return value if _TYPE_NAMES.get(type(value)) in types - {"string"} else text


_TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


def _types(schema: Any) -> set[str]:
    """Types that a schema names; empty where it names none."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type", ())
    found = {named} if isinstance(named, str) else {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            found |= _types(branch)
    return found
