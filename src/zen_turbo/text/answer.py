"""What an answer consists of: thoughts up to ``</think>``, text, tool calls. One reader for streams and for whole answers, so that both say
the same."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zen_turbo.text.tools import CallArguments, CallStart, Piece, Text, ToolCallParser, ToolForm, without_beginning

THINK, THINK_END = "<think>", "</think>"


class Thinking(enum.Enum):
    """What the prompt leaves open: the model does not think, may begin to, or is already at it because the prompt ends inside."""

    NONE = "none"
    POSSIBLE = "possible"
    BEGUN = "begun"


def thinking_at_end_of(prompt: str, *, continued: str | None = None) -> Thinking:
    """prompt: the end of what a model that can think is given; continued: the message of its own that it goes on with."""
    prompt = prompt.rstrip()
    if prompt.endswith(THINK):
        return Thinking.BEGUN
    if prompt.endswith(THINK_END):  # templates switch thinking off with an empty thought
        return Thinking.NONE
    if continued is not None:
        return Thinking.BEGUN if continued.rfind(THINK) > continued.rfind(THINK_END) else Thinking.NONE
    return Thinking.POSSIBLE


@dataclass(frozen=True)
class AnswerForm:
    """How to read an answer. ``tools``: name -> schema of its arguments; without them, or without a form, calls are text."""

    thinking: Thinking = Thinking.NONE
    tool_form: ToolForm | None = None
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Thought(NamedTuple):
    text: str


@dataclass
class Call:
    name: str
    arguments: str = ""


class AnswerReader:
    """Feed it an answer's text; it gives back pieces, and keeps the whole: ``reasoning``, ``content``, ``calls``."""

    def __init__(self, form: AnswerForm) -> None:
        self._thinking = form.thinking
        self._parser = ToolCallParser(form.tool_form, form.tools) if form.tool_form is not None and form.tools else None
        self._held = ""
        self._trim = False
        self.reasoning = ""
        self.content = ""
        self.calls: list[Call] = []

    @property
    def is_thinking(self) -> bool:
        return self._thinking is Thinking.BEGUN

    def push(self, text: str) -> list[Thought | Piece]:
        pieces: list[Thought | Piece] = []
        if self._thinking is not Thinking.NONE:
            text = self._think(pieces, text, end=False)
        return self._kept([*pieces, *self._answer(text)])

    def flush(self) -> list[Thought | Piece]:
        """The end of the answer."""
        pieces: list[Thought | Piece] = []
        text = self._think(pieces, "", end=True) if self._thinking is not Thinking.NONE else ""
        return self._kept([*pieces, *self._answer(text), *(self._parser.flush() if self._parser else ())])

    def give_up_broken_calls(self, text: str) -> None:
        """For an answer that is shown whole: if the arguments of a call are not JSON, it is all text. ``text``: the whole answer."""
        try:
            for call in self.calls:
                json.loads(call.arguments)
        except (ValueError, RecursionError):
            self.calls = []
            self.content = text.partition(THINK_END)[2].lstrip("\n") if self.reasoning and THINK_END in text else text

    def _think(self, pieces: list[Thought | Piece], text: str, *, end: bool) -> str:
        """Take thoughts from what is held and ``text``; returns what comes after them."""
        held = self._held + text
        if self._thinking is Thinking.POSSIBLE:
            start = held.lstrip()
            if not end and THINK.startswith(start[: len(THINK)]) and len(start) < len(THINK):
                self._held = held
                return ""
            if not start.startswith(THINK):
                self._held, self._thinking = "", Thinking.NONE
                return held
            self._thinking = Thinking.BEGUN
            held = start[len(THINK) :]
            self.reasoning = ""
        at = held.find(THINK_END)
        if at >= 0:
            self._thought(pieces, held[:at].rstrip("\n"))
            self._held, self._thinking, self._trim = "", Thinking.NONE, True
            return held[at + len(THINK_END) :]
        # A line end waits, because the one before </think> belongs to the tag.
        safe = len(held) if end else len(held[: without_beginning(held, THINK_END)].rstrip("\n"))
        self._thought(pieces, held[:safe])
        self._held = held[safe:]
        return ""

    def _thought(self, pieces: list[Thought | Piece], text: str) -> None:
        if not self.reasoning:
            text = text.lstrip("\n")
        if text:
            self.reasoning += text
            pieces.append(Thought(text))

    def _answer(self, text: str) -> list[Piece]:
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        if not text:
            return []
        return self._parser.push(text) if self._parser else [Text(text)]

    def _kept(self, pieces: list[Thought | Piece]) -> list[Thought | Piece]:
        for piece in pieces:
            if isinstance(piece, Text):
                self.content += piece.text
            elif isinstance(piece, CallStart):
                self.calls.append(Call(piece.name))
            elif isinstance(piece, CallArguments):
                self.calls[piece.index].arguments += piece.fragment
        return pieces
