"""`adapt-pruner run`"""

from __future__ import annotations

import click


@click.command("run")
@click.argument("model")
@click.argument("prompt")
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True, help="New tokens.")
@click.option("--chat", is_flag=True, help="Put PROMPT into the model's chat template.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with MODEL.")
def command(model: str, prompt: str, tokens: int, chat: bool, trust_remote_code: bool) -> None:
    """Continue PROMPT with MODEL, most probable token by token: a first look.

    \b
    adapt-pruner run smaller "Once upon a time"
    adapt-pruner run smaller.gguf "What is a llama?" --chat

    A GGUF file runs in llama.cpp (pip install 'adapt-pruner[llama-cpp]'), all else in transformers.
    """
    from ..evaluation.first_look import first_look
    from . import console

    console.hush_libraries()
    click.echo(first_look(model, prompt, tokens, chat, trust_remote_code))
