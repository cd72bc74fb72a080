"""``pf``: finds the command, and turns whatever ends it into one line and an exit status.

Knows the names of the commands, not what they do: each is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from protoframe._version import __version__
from protoframe.cli.output import report
from protoframe.cli.problems import FAILURE, INTERRUPTED, PIPE, STATUSES, USAGE, Problem

__all__ = ["main", "pf"]

#: In the order of the help: the module of each command and its name there.
_COMMANDS = {
    "call": ("call", "call"),
    "list": ("listing", "list_"),
    "describe": ("describe", "describe"),
    "ping": ("ping", "ping"),
    "bench": ("bench", "bench"),
    "health": ("health", "health"),
    "queue": ("queue", "queue"),
    "put": ("files_copy", "put"),
    "get": ("files_copy", "get"),
    "sync": ("files_copy", "sync"),
    "ls": ("files", "ls"),
    "rm": ("files", "rm"),
    "mv": ("files", "mv"),
    "mkdir": ("files", "mkdir"),
    "verify": ("files", "verify"),
    "dev-certs": ("dev_certs", "dev_certs"),
    "completion": ("completion", "completion"),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"protoframe.cli.{module}"), name)
        return command


@click.group(
    cls=_Commands,
    no_args_is_help=False,
    epilog=STATUSES,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="pf", message="%(prog)s (protoframe) %(version)s")
def pf() -> None:
    """Call protoframe servers, and look at what they serve.

    A server describes itself, so nothing else need be at hand.  Results go to standard output, everything else to
    standard error.  Each option stands behind its command.  In the environment, PROTOFRAME_TIMEOUT, PROTOFRAME_JSON and
    PROTOFRAME_QUIET stand for the options of these names, and PROTOFRAME_TOKEN for a token; NO_COLOR turns colours off.

    \b
    Examples:
      pf list tcp:127.0.0.1:12000
      pf call tcp:127.0.0.1:12000 Speech.upper text=hello
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs ``pf``; by default with what was typed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _leave(_run(words))


def _run(words: list[str]) -> int:
    """Runs a command; the exit status."""
    try:
        instruction = os.environ.get("_PF_COMPLETE")
        if instruction:
            return _complete(instruction)
        with pf.make_context("pf", words) as context:
            pf.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        return _fail(_usage_problem(error))
    except Problem as problem:
        return _fail(problem)
    except BrokenPipeError:
        return PIPE
    except (KeyboardInterrupt, click.Abort):
        return _fail(Problem("interrupted", INTERRUPTED))
    except MemoryError:
        return _fail(Problem("out of memory", FAILURE))
    except Exception as error:
        return _fail(Problem(f"{type(error).__name__}: {error}", FAILURE, "to report it, for this is a bug in pf"))
    return 0


def _complete(instruction: str) -> int:
    """Answers a completion script."""
    from click.shell_completion import add_completion_class, shell_complete

    from protoframe.cli.completion import SHELLS, VARIABLE

    for made in SHELLS.values():
        add_completion_class(made)
    try:
        return shell_complete(pf, {}, "pf", VARIABLE, instruction)
    except (Problem, KeyError, ValueError, OSError):
        return FAILURE


def _fail(problem: Problem) -> int:
    report(problem)
    return problem.status


def _usage_problem(error: click.ClickException) -> Problem:
    text = " ".join(error.format_message().split()).rstrip(".")
    context: Any = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "pf"
    return Problem(f"{text[:1].lower()}{text[1:]}", USAGE, f"{command} --help")


def _leave(status: int) -> NoReturn:
    """Exits.  Nothing more is written: what could not be said to a closed stream stays unsaid."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _silence(stream)
    if threading.active_count() > 1:
        # A thread of the reactor that looks up a name, and would be waited for.
        os._exit(status)
    sys.exit(status)


def _silence(stream: Any) -> None:
    """Has what is left in a stream go nowhere, so that the interpreter does not complain when it flushes it."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):
        pass
