"""The command ``zen-turbo``: verbs, and what happens when one fails.

Answers and tables go to standard output, everything else to standard error. A user's mistake is one line, ``error [code]: message``, and exit
status 1; a wrong flag is status 2; an interrupt is 130 (both typer's). ``--debug`` (or ZEN_TURBO_DEBUG=1) shows the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from zen_turbo import __version__
from zen_turbo.cli.ask import ask
from zen_turbo.cli.cache import cache_app
from zen_turbo.cli.doctor import doctor
from zen_turbo.cli.measure import bench_app, eval_app
from zen_turbo.cli.pull import pull
from zen_turbo.cli.serve import serve
from zen_turbo.errors import ZenTurboError

DEBUG_ENVIRONMENT = "ZEN_TURBO_DEBUG"

app = typer.Typer(
    name="zen-turbo",
    help="Open-weight language models at contexts up to one million tokens, on ordinary machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(ask)
app.command()(serve)
app.command()(pull)
app.command()(doctor)
app.add_typer(cache_app, name="cache")
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"zen-turbo {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG_ENVIRONMENT] = "1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="zen-turbo")
    except BrokenPipeError:  # whoever read our output has left; Python must not write to it again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except ZenTurboError as error:
        _fail(error.code, error.message)
    except Exception as error:
        _fail("internal_error", f"{type(error).__name__}: {error} (run again with --debug for the traceback; this is a fault of zen-turbo)")


def _fail(code: str, message: str) -> None:
    if os.environ.get(DEBUG_ENVIRONMENT):
        traceback.print_exc()
    print(f"error [{code}]: {message}", file=sys.stderr)
    sys.exit(1)
