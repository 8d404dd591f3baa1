"""`adapt-pruner demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..limits import Seed
from .parameters import Number

PROMPT = "The for statement is used to"


@click.command("demo")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("demo-run"), show_default=True,
    help="Directory to write.",
)  # fmt: skip
@click.option("--sparsity", type=float, default=0.3, show_default=True, help="Share to remove.")
@click.option("--seed", type=Number(Seed), default=0, show_default=True, help="Seed of the run.")
def command(output: Path, sparsity: float, seed: int) -> None:
    """Prune the small model that ships with the package. Needs no hub and no GPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..allocate.target import resolve_target
    from ..evaluation import compare_speed
    from ..methods import make_settings
    from ..model.anatomy import find_anatomy
    from ..model.loading import EMBEDDED_MODEL, empty_model, load_model
    from ..result import PRUNING_FILE
    from ..run import Request, default_calibration, run_pruning
    from . import console

    console.hush_libraries()
    out = console.out
    resolve_target(
        find_anatomy(empty_model(EMBEDDED_MODEL)), sparsity, None
    )  # before the first word
    out.print(f"[bold]1. Prune[/] the embedded model: {sparsity:.0%} of its decoder layers go")
    settings = make_settings("best", seed=seed, **default_calibration(EMBEDDED_MODEL))
    again = (output / PRUNING_FILE).is_file()  # replaces results, and nothing else
    request = Request(EMBEDDED_MODEL, settings, sparsity, evaluate="pydocs", overwrite=again)
    with console.ProgressBar(quiet=False) as bar:
        result = run_pruning(request, output, bar)
    console.show_result(result)

    out.print(f"\n[bold]2. Reload[/] {output} with plain transformers, and compare speed")
    dense = load_model(EMBEDDED_MODEL, device="cpu")
    pruned = AutoModelForCausalLM.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    before, after = compare_speed([dense, pruned])
    for name, old, new in (
        ("prefill", before.prefill_tokens_per_s, after.prefill_tokens_per_s),
        ("decode", before.decode_tokens_per_s, after.decode_tokens_per_s),
    ):
        out.print(f"{name:8} {old:8,.0f} → {new:8,.0f} tokens/s  ({new / old:.2f}×)")

    out.print(f"\n[bold]3. Generate[/] from '{PROMPT}'")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    models: dict[str, Any] = {"dense": dense, "pruned": pruned}
    for name, model in models.items():
        ids = model.generate(**inputs, max_new_tokens=40)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        out.print(f"[bold]{name:7}[/]{' '.join(text.split())}", soft_wrap=True)
    out.print(f"\nThe model, its card, run.json and pictures are in [bold]{output}[/]; ", end="")
    out.print("report.html shows it all")
