"""Command-line flags of the engine, generated from EngineConfig: a knob declared there is a flag of every command that runs a model."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from zen_turbo.config import EngineConfig, flag_of


def engine_options(command: Callable[..., Any], *, without: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Replace the parameter ``config: EngineConfig`` of a command by one flag per knob, but for those in ``without``, which keep their
    defaults. Values are checked by EngineConfig."""
    hints = typing.get_type_hints(EngineConfig)
    flags = []
    for knob in dataclasses.fields(EngineConfig):
        if knob.name in without:
            continue
        names = [flag_of(knob.name)]
        if hints[knob.name] is bool:
            names = [f"{names[0]}/--no-{names[0][2:]}"]
        choices = knob.metadata["choices"]
        option = typer.Option(*names, help=knob.metadata["help"], metavar="|".join(choices) if choices else None, rich_help_panel="Engine")
        flags.append(
            inspect.Parameter(
                knob.name, inspect.Parameter.KEYWORD_ONLY, default=knob.default, annotation=Annotated[hints[knob.name], option]
            )
        )
    names = {flag.name for flag in flags}
    own = [parameter for parameter in inspect.signature(command, eval_str=True).parameters.values() if parameter.name != "config"]
    assert not names & {parameter.name for parameter in own}, "a command's own flag has the name of a knob"

    @functools.wraps(command)
    def with_flags(**values: Any) -> Any:
        knobs = {name: values.pop(name) for name in names}
        return command(**values, config=EngineConfig.from_dict(knobs))

    positional = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    with_flags.__signature__ = inspect.Signature([*positional, *flags])  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *flags]}
    return with_flags
