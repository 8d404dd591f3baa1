"""The program: commands, and how errors reach the user."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from .. import __version__
from ..errors import AdaptPrunerError, Interrupted, near_match, shortened, shown

OUT_OF_MEMORY = {
    "prune": "--gradient-checkpointing, --dtype bfloat16, or --micro-batch-size 1",
    "accel": "--gradient-checkpointing, --dtype bfloat16, --micro-batch-size 1 for calibration, or "
    "--per-device-train-batch-size 1 for training",
    "compare": "--gradient-checkpointing, --dtype bfloat16, or --micro-batch-size 1",
    "search": "--gradient-checkpointing, --dtype bfloat16, or a smaller --validation-window",
    "evaluate": "--batch-size 1, --dtype bfloat16, or a smaller --window or --max-length",
    "bench": "a smaller --batch-size or --prompt-tokens, or --dtype bfloat16",
    "report": "fewer models at once, or --device cpu",
}
"""Command -> what to try when it does not fit."""

LONGEST_MESSAGE, LONGEST_VALUE = 2_000, 120


class Program(click.Group):
    """A group that loads a command's module when it is used, and reports errors in one line."""

    commands_in = {  # noqa: RUF012
        "prune": "prune",
        "accel": "accel",
        "evaluate": "evaluate",
        "bench": "bench",
        "inspect": "inspect",
        "export": "export",
        "run": "run",
        "methods": "methods",
        "compare": "compare",
        "search": "search",
        "report": "report",
        "demo": "demo",
        "with": "with_command",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_in)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from importlib import import_module

        if cmd_name not in self.commands_in:
            return None
        return import_module(f".{self.commands_in[cmd_name]}", __package__).command

    def resolve_command(self, ctx: click.Context, args: list[str]):
        if args and not args[0].startswith("-") and args[0] not in self.commands_in:
            hint = near_match(args[0], self.commands_in)
            known = ", ".join(self.commands_in)
            raise click.UsageError(f"There is no command '{args[0]}'.{hint} Commands: {known}.")
        return super().resolve_command(ctx, args)


@click.command(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="adapt-pruner")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def program(debug: bool) -> None:  # main() looks at --debug
    """Make a Hugging Face causal language model smaller, to exactly the size you name."""


def main(args: list[str] | None = None) -> None:
    """Run the program and exit. Every error is one message on stderr and a non-zero status."""
    arguments = sys.argv[1:] if args is None else args
    # It may stand anywhere: people add it to a command that failed. What follows `with` belongs to
    # another program.
    end = _end_of_ours(arguments)
    debug = "--debug" in arguments[:end]
    ours = [argument for argument in arguments[:end] if argument != "--debug"]
    _check_arguments(ours)
    arguments = [*ours, *arguments[end:]]
    with _stops_at_sigterm() as signals:
        try:
            program.main(args=arguments, prog_name="adapt-pruner", standalone_mode=False)
        except click.exceptions.Exit as exit_:
            sys.exit(exit_.exit_code)
        except (click.Abort, KeyboardInterrupt):
            what = "Stopped by SIGTERM" if signals else "Interrupted"
            _fail(f"{what}; nothing was written.", _status(signals))
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except Interrupted as error:
            _fail(str(error), _status(signals))
        except Exception as error:
            if debug:
                raise
            _fail(*_explained(error, arguments))


def _end_of_ours(arguments: list[str]) -> int:
    """Where another program's arguments begin: at the command `with`."""
    verb = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    return len(arguments) if verb is None or arguments[verb] != "with" else verb


def _check_arguments(arguments: list[str]) -> None:
    """No option or argument means anything when it is empty, and "" as a path is the current
    directory."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        is_option = argument.startswith("--") and bool(equals)
        if not (value if is_option else argument).strip():
            where = name if is_option else before
            _fail(f"The argument{f' after {where}' * bool(where)} is empty; give it a value.", 2)
        if not argument.isascii() and argument != argument.encode("utf-8", "ignore").decode():
            _fail(f"An argument is no text in UTF-8: {shown(argument)}.", 2)


@contextmanager
def _stops_at_sigterm() -> Iterator[list[int]]:
    """Treat SIGTERM as SIGINT is treated: what is half-written goes, and a message says what is
    kept. Yields the signals that came."""
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _status(signals: list[int]) -> int:
    return 128 + (signals[0] if signals else signal.SIGINT)


def _explained(error: Exception, arguments: list[str]) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    if isinstance(error, click.NoSuchOption):
        hint = near_match(error.option_name, error.possibilities or [])
        taken = error.ctx.command.get_params(error.ctx) if error.ctx else []
        has_methods = any(parameter.name == "method" for parameter in taken)
        owner = _owner(error.option_name) if has_methods else ""
        return f"There is no option '{error.option_name}'.{owner}{hint} --help lists them.", 2
    if isinstance(error, click.ClickException):
        message = error.format_message()
        for argument in arguments:  # click shows values in full
            value = argument.partition("=")[2] if argument.startswith("--") else argument
            if len(value) > LONGEST_VALUE:
                message = message.replace(value, shortened(value, LONGEST_VALUE))
        return message, error.exit_code
    if isinstance(error, AdaptPrunerError):
        return str(error), 1
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, MemoryError) or _is_out_of_memory(text):
        advice = OUT_OF_MEMORY.get(arguments[0] if arguments else "", "a machine with more of it")
        return f"Out of memory. Try {advice}.", 1
    return f"Unexpected error, please report it ({text[:500]}). --debug shows where.", 1


def _owner(option: str) -> str:
    """Which other methods have a setting of that name, as the end of a message."""
    from ..methods import owners_of

    owners = owners_of(option.lstrip("-").replace("-", "_"))
    return f" It is a setting of {', '.join(owners)}: add --method." if owners else ""


def _is_out_of_memory(text: str) -> bool:
    return "out of memory" in text.lower() or "can't allocate memory" in text


def _fail(message: str, status: int) -> NoReturn:
    if len(message) > LONGEST_MESSAGE:  # of a library, with a value that it was given
        message = f"{message[:LONGEST_MESSAGE]}..."
    click.echo(f"adapt-pruner: error: {message}", err=True)
    sys.exit(status)
