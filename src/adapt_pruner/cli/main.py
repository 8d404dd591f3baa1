"""The program: commands, and how errors reach the user."""

from __future__ import annotations

import sys

import click

from .. import __version__
from ..errors import AdaptPrunerError, Interrupted, near_match

OUT_OF_MEMORY = (
    "Out of memory. Try --gradient-checkpointing, --dtype bfloat16, --micro-batch-size 1 for "
    "calibration, or --per-device-train-batch-size 1 for training."
)


class Program(click.Group):
    """A group that loads a command's module when it is used, and reports errors in one line."""

    commands_in = {  # noqa: RUF012
        "prune": "prune",
        "accel": "accel",
        "evaluate": "evaluate",
        "bench": "bench",
        "inspect": "inspect",
        "methods": "methods",
        "compare": "compare",
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
    # Anywhere, because it is an afterthought; but what stands after `with` is another program's.
    verb = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    is_with = verb is not None and arguments[verb] == "with"
    end = verb if is_with else len(arguments)
    debug = "--debug" in arguments[:end]
    ours = [argument for argument in arguments[:end] if argument != "--debug"]
    try:
        program.main(
            args=[*ours, *arguments[end:]],
            prog_name="adapt-pruner",
            standalone_mode=False,
        )
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("Interrupted; nothing was written.", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.NoSuchOption as error:
        hint = near_match(error.option_name, error.possibilities or [])
        _fail(
            f"There is no option '{error.option_name}'.{_owner(error.option_name)}{hint} --help "
            "lists them.",
            2,
        )
    except click.ClickException as error:
        if debug:
            raise
        _fail(error.format_message(), error.exit_code)
    except Interrupted as error:
        _fail(str(error), 130)
    except AdaptPrunerError as error:
        if debug:
            raise
        _fail(str(error), 1)
    except MemoryError:
        _fail(OUT_OF_MEMORY, 1)
    except Exception as error:
        if debug:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if "out of memory" in text.lower() or "can't allocate memory" in text:
            _fail(f"{OUT_OF_MEMORY} ({text})", 1)
        _fail(f"Unexpected error, please report it ({text}). --debug shows where.", 1)


def _owner(option: str) -> str:
    """Whose setting it is, if another method has one of that name."""
    from ..methods import owners_of

    owners = owners_of(option.lstrip("-").replace("-", "_"))
    return f" It is a setting of {', '.join(owners)}: add --method." if owners else ""


def _fail(message: str, status: int) -> None:
    click.echo(f"adapt-pruner: error: {message}", err=True)
    sys.exit(status)
