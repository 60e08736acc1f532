"""The command line: finds the command, and turns mistakes into one line and a status."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import spanbert_fast
from spanbert_fast.cli.arguments import parse
from spanbert_fast.cli.commands import COMMANDS, FAILURE

DEBUG_VARIABLE = "SPANBERT_FAST_DEBUG"
_USER_ERROR, _INTERRUPTED = 2, 130


def usage() -> str:
    """The text of `spanbert-fast --help`."""
    lines = ["usage: spanbert-fast [--help] [--version] COMMAND ...", "", "commands:"]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "`spanbert-fast COMMAND --help` lists the options of a command."]
    return "\n".join(lines) + "\n"


def _run_command(name: str, arguments: Sequence[str]) -> int:
    """Parse and run; mistakes of the user become one line and status 2, failed runs status 1."""
    command = COMMANDS[name]
    try:
        options, as_json = parse(command, name, arguments)
        status = command.run(options, as_json)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; without this the interpreter would complain once more when it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        sys.stderr.write(f"error: {_message(error)}\n")
        return FAILURE if isinstance(error, RuntimeError) else _USER_ERROR


def _message(error: Exception) -> str:
    """What happened, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _print_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    sys.stderr.write(f"warning: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 after a failed run, 2 after a user's mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("--help", "-h", "help"):
        sys.stdout.write(usage())
        return 0 if words else _USER_ERROR
    if words[0] == "--version":
        sys.stdout.write(f"spanbert-fast {spanbert_fast.__version__}\n")
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        sys.stderr.write(
            f"error: unknown command {words[0]!r}.{hint} Commands: {', '.join(COMMANDS)}\n"
        )
        return _USER_ERROR
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        return _run_command(words[0], words[1:])
