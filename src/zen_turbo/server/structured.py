"""What a request demands of the shape of its answer: formats and tools, checked and turned into one grammar for the engine."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zen_turbo.engine import guidance
from zen_turbo.engine.guidance import literal
from zen_turbo.errors import InvalidRequestError, UnsupportedParameterError, shown
from zen_turbo.text.answer import THINK, THINK_END, Thinking
from zen_turbo.text.tools import CLOSE, OPEN, ToolForm

MAX_TOOLS = 128
_NAME = re.compile(r"""[^\s<>"\\]{1,200}""")
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_MAX_CHOICES = 1000


@dataclass(frozen=True)
class Function:
    """A tool. ``parameters``: JSON schema of its arguments; ``strict``: whether arguments must be valid for it."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True)
class ToolUse:
    """``mode``: none, auto or required; ``functions``: those that may be called."""

    mode: str = "none"
    functions: tuple[Function, ...] = ()

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        return {function.name: function.parameters for function in self.functions}


def functions_of(tools: Sequence[Any]) -> tuple[Function, ...]:
    """Tools in chat's shape, {"type": "function", "function": {...}}. Raises InvalidRequestError and UnsupportedParameterError (param tools)."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"At most {MAX_TOOLS} tools can be given, not {len(tools)}.", param="tools")
    found: dict[str, Function] = {}
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping) or tool.get("type", "function") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else type(tool).__name__
            raise UnsupportedParameterError(f"{where}: a tool of type {shown(kind)} is not supported (function is).", param="tools")
        function = tool["function"]
        name, parameters = function.get("name"), function.get("parameters") or _NO_PARAMETERS
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in found:
            message = f"{where}: a function needs a name of its own, without spaces or quotes, not {str(name)[:100]!r}."
            raise InvalidRequestError(message, param="tools")
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise InvalidRequestError(f"{where}: parameters must be a JSON schema of an object.", param="tools")
        found[name] = Function(name, parameters, strict=function.get("strict") is True)
    return tuple(found.values())


def tool_use(functions: tuple[Function, ...], choice: Any) -> ToolUse:
    """choice: tool_choice, chat's shape. Raises InvalidRequestError and UnsupportedParameterError (param tool_choice)."""
    if choice is None or choice == "auto":
        return ToolUse("auto" if functions else "none", functions)
    if choice == "none":
        return ToolUse()
    if choice == "required":
        if not functions:
            raise InvalidRequestError("tool_choice is required, but there are no tools.", param="tool_choice")
        return ToolUse("required", functions)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise UnsupportedParameterError("tool_choice must be none, auto, required or the name of a function.", param="tool_choice")
    chosen = tuple(each for each in functions if each.name == function.get("name"))
    if not chosen:
        raise InvalidRequestError(f"tool_choice names {str(function.get('name'))[:100]!r}, which is none of the tools.", param="tool_choice")
    return ToolUse("required", chosen)


def response_format_rule(value: Any) -> str | None:
    """A grammar's part for OpenAI's response_format; None for free text. Raises InvalidRequestError and UnsupportedParameterError."""
    param = "response_format"
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return guidance.json_object()
    if kind != "json_schema":
        message = f"response_format of type {shown(kind)} is not supported (text, json_object and json_schema are)."
        raise UnsupportedParameterError(message, param=param)
    inner = value.get("json_schema")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), Mapping | bool):
        raise InvalidRequestError("response_format of type json_schema needs json_schema.schema, a JSON schema.", param=param)
    # Unless told that it need not be exact, a schema that cannot be followed to the letter is refused.
    return guidance.json_schema(inner["schema"], strict=inner.get("strict") is not False)


def structured_outputs_rule(value: Mapping[str, Any], *, param: str) -> str | None:
    """A grammar's part for vLLM's structured_outputs (json, json_object, regex, choice)."""
    given = {name: item for name, item in value.items() if item is not None and item is not False}
    if not given:
        return None
    ((name, item), *more) = given.items()
    if more or name not in ("json", "json_object", "regex", "choice"):
        raise UnsupportedParameterError(f"{param} takes one of json, json_object, regex and choice, not {', '.join(given)[:200]}.", param=param)
    if name == "json_object":
        return guidance.json_object()
    if name == "json":
        if isinstance(item, Mapping | bool):
            return guidance.json_schema(item)
        raise InvalidRequestError("json must be a JSON schema.", param=param)
    if name == "regex":
        if isinstance(item, str) and item:
            return guidance.regex(item)
        raise InvalidRequestError("regex must be a regular expression.", param=param)
    if isinstance(item, list) and 0 < len(item) <= _MAX_CHOICES and all(isinstance(text, str) and text for text in item):
        return guidance.choice(item)
    raise InvalidRequestError(f"choice must be a list of 1 to {_MAX_CHOICES} texts.", param=param)


def grammar(
    answer: str | None,
    use: ToolUse,
    form: ToolForm | None,
    *,
    one_call: bool,
    thinking: Thinking,
    special_tokens: Collection[str],
) -> str | None:
    """One grammar for an answer, or None where it is free.

    answer: the rule of a format. Calls are bound by it where they are required, where there is a format beside them, and where a function is
    strict; else they are free text that a parser reads. Thoughts come before all of it, unbound.
    """

    def tag(text: str) -> str:
        return text if text in special_tokens else literal(text)

    strict = any(function.strict for function in use.functions)
    bound = use.mode == "required" or (use.mode == "auto" and (answer is not None or strict))
    if not bound and answer is None:
        return None
    rules = [f"format: {answer}"] if answer is not None else []
    alternatives = ["format"] if answer is not None and use.mode != "required" else []
    if bound and form is not None:
        rules += _calls(use.functions, form, tag=tag, one_call=one_call)
        if use.mode == "auto" and answer is None:
            rules += _free_text_with_calls(form, tag=tag, one_call=one_call)
            alternatives.append("text_with_calls")
        else:
            alternatives.append("calls")
    start = " | ".join(alternatives)
    if thinking is not Thinking.NONE:
        special = THINK_END in special_tokens
        rules.append(f"thought: /(.|\\n)*/ {THINK_END}" if special else f"thought[suffix={literal(THINK_END)}]: /(.|\\n)*/")
        rules.append("gap: /\\n{1,2}/")
        thought = "thought gap?" if thinking is Thinking.BEGUN else f"({tag(THINK)} thought gap?)?"
        start = f"{thought} ({start})"
    return "\n".join([f"start: {start}", *rules])


def _calls(functions: Sequence[Function], form: ToolForm, *, tag: Any, one_call: bool) -> list[str]:
    """Rules ``calls`` (one or several) and ``body`` (what stands between the tags of one)."""
    if form is ToolForm.QWEN_CODER:
        bodies = [_coder_body(function) for function in functions]
    else:
        key = "parameters" if form is ToolForm.LLAMA else "arguments"
        bodies = []
        for function in functions:
            head = literal('{"name": "' + function.name + f'", "{key}": ')
            bodies.append(f'{head} {guidance.json_schema(_closed(function.parameters), strict=function.strict)} "}}"')
    rules = [f"body: {' | '.join(f'body_{number}' for number in range(len(bodies)))}"]
    rules += [f"body_{number}: {body}" for number, body in enumerate(bodies)]
    if form is ToolForm.LLAMA:
        return ["calls: body", *rules]
    if form is ToolForm.QWEN_CODER:
        rules.append('text_value[suffix="\\n</parameter>\\n"]: /(.|\\n)*/')
    return [
        "calls: call" if one_call else 'calls: call ("\\n" call)*',
        f'call: {tag(OPEN)} "\\n" body "\\n" {tag(CLOSE)}',
        *rules,
    ]


def _free_text_with_calls(form: ToolForm, *, tag: Any, one_call: bool) -> list[str]:
    """Text in which every opening tag begins a call."""
    if form is ToolForm.LLAMA:
        return ["text_with_calls: calls | /[^{<](.|\\n)*/"]
    special = tag(OPEN) == OPEN
    lead = f"lead: TEXT {OPEN}" if special else f"lead[lazy]: TEXT {tag(OPEN)}"
    call = f'(lead "\\n" body "\\n" {tag(CLOSE)})' + ("?" if one_call else "*")
    return [f"text_with_calls: {call} tail", lead, "tail: TEXT", "TEXT: /(.|\\n)*/"]


def _closed(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that a function does not name help nobody, unless its schema asks for them."""
    return {"additionalProperties": False, **parameters} if parameters.get("properties") else dict(parameters)


def _coder_body(function: Function) -> str:
    """Parameters in the schema's order, strings as they are and everything else as JSON."""
    root = {key: value for key, value in function.parameters.items() if key in ("$defs", "definitions")}
    required = function.parameters.get("required", ())
    parts = [literal(f"<function={function.name}>\n")]
    properties = function.parameters.get("properties", {})
    for name, schema in properties.items() if isinstance(properties, Mapping) else ():
        head = literal(f"<parameter={name}>\n")
        if isinstance(schema, Mapping) and schema.get("type") == "string":
            choices = schema.get("enum")
            if isinstance(choices, list) and choices and all(isinstance(text, str) for text in choices):
                value = guidance.choice(choices) + ' "\\n</parameter>\\n"'
            else:
                value = "text_value"
        else:
            rule = guidance.json_schema({**root, **schema} if isinstance(schema, Mapping) else schema, strict=function.strict)
            value = rule + ' "\\n</parameter>\\n"'
        parts.append(f"{head} {value}" if name in required else f"({head} {value})?")
    return " ".join([*parts, literal("</function>")])
