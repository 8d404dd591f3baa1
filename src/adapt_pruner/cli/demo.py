"""`adapt-pruner demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..limits import Seed, Windows
from .parameters import Number

PROMPT = "The for statement is used to"


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True,
    help="Directory to write.",
)  # fmt: skip
@click.option("--sparsity", type=float, default=0.3, show_default=True, help="Share to remove.")
@click.option("--seed", type=Number(Seed), default=0, show_default=True, help="Seed of the run.")
@click.option(
    "--model", default="demo", show_default=True,
    help="Another model: a name on the hub, a directory or a GGUF file.",
)  # fmt: skip
@click.option(
    "--text", default="pydocs", show_default=True,
    help="Text to measure perplexity on, before and after.",
)  # fmt: skip
@click.option("--windows", type=Number(Windows), help="Calibration windows per step.")
def command(
    output: Path, sparsity: float, seed: int, model: str, text: str, windows: int | None
) -> None:
    """Prune the small model that ships with the package, or another. Needs no hub and no GPU."""
    from ..allocate.target import resolve_target
    from ..data.calibration import EMBEDDED
    from ..methods import make_settings
    from ..model.anatomy import find_anatomy
    from ..model.loading import EMBEDDED_MODEL, empty_model
    from ..result import PRUNING_FILE
    from ..run import Request, run_pruning
    from . import console

    console.hush_libraries()
    out = console.out
    resolve_target(find_anatomy(empty_model(model)), sparsity, None)  # before the first word
    what = "the embedded model" if model == EMBEDDED_MODEL else Path(model).name
    out.print(f"[bold]1. Prune[/] {what}: {sparsity:.0%} of its decoder layers go")
    few: dict[str, Any] = {} if windows is None else {"windows": windows}
    settings = make_settings("best", seed=seed, calibration=EMBEDDED, **few)
    again = (output / PRUNING_FILE).is_file()  # replaces results, and nothing else
    request = Request(model, settings, sparsity=sparsity, evaluate=text, overwrite=again)
    with console.ProgressBar(quiet=False) as bar:
        result = run_pruning(request, output, bar)
    console.show_result(result)

    _show_speed_and_words(model, output)
    out.print(f"\nThe model, its card, run.json and pictures are in [bold]{output}[/]; ", end="")
    out.print("report.html shows it all")


def _show_speed_and_words(model: str, output: Path) -> None:
    """What the model that was written is like to use, beside the dense one."""
    from rich.markup import escape
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..evaluation import compare_speed
    from ..model.loading import load_model
    from .console import out

    out.print(f"\n[bold]2. Reload[/] {output} with plain transformers, and compare speed")
    dense = load_model(model, device="cpu")
    # In the same precision: float16, which a file may be stored in, is slow on most CPUs.
    pruned = AutoModelForCausalLM.from_pretrained(output, dtype=dense.dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    before, after = compare_speed([dense, pruned])
    for name, old, new, ratio in (
        ("prefill", before.prefill_tokens_per_s, after.prefill_tokens_per_s, after.prefill_speedup),
        ("decode", before.decode_tokens_per_s, after.decode_tokens_per_s, after.decode_speedup),
    ):
        out.print(f"{name:8} {old:8,.0f} → {new:8,.0f} tokens/s  ({ratio:.2f}×)")

    out.print(f"\n[bold]3. Generate[/] from '{PROMPT}'")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    models: dict[str, Any] = {"dense": dense, "pruned": pruned}
    for name, one in models.items():
        ids = one.generate(**inputs, max_new_tokens=40, do_sample=False)
        words = tokenizer.decode(ids[0], skip_special_tokens=True).split()
        out.print(f"[bold]{name:7}[/]{escape(' '.join(words))}", soft_wrap=True)
