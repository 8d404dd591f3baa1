"""What methods that need forward passes alone cost, over the passes that they need.

    OMP_NUM_THREADS=1 python benchmarks/forward_cost.py [--size 10M] [--windows 64] [--json FILE]

Models have random weights (those of step_cost.py). A run is everything: passes, scores, choice and
cut of a fifth of the decoder layers. The yardstick is the same number of plain forward passes over
the same windows in the same micro-batches, up to the last hidden states, or with the loss where the
method needs it; runs and passes are timed in turns, in CPU seconds of the process, and compared by
medians. Eigen-decompositions, which SliceGPT makes of every basis, are timed apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from step_cost import WINDOW, build, calibration_for, now

from adapt_pruner.methods import Work, make_settings, method_named
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.report.account import versions_used
from adapt_pruner.score.collect import MICRO_BATCH_TOKENS
from adapt_pruner.score.head import hidden_states

VARIANTS = {
    "flap": {"method": "flap"},
    "minitron, shape given": {"method": "minitron"},
    "shortgpt": {"method": "depth"},
    "sleb": {"method": "depth", "preset": "sleb"},
    "slicegpt": {"method": "slicegpt"},
    "slicegpt, shared rotation": {"method": "slicegpt", "shared_rotation": True},
}
NEED_LOSS = ("sleb",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="10M")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    record: dict = {
        "versions": versions_used(), "size": arguments.size, "tokens": arguments.windows * WINDOW,
        "threads": torch.get_num_threads(), "variants": {},
    }  # fmt: skip
    print("| method | passes | run / passes | eigen-decompositions / passes |")
    print("| --- | --- | --- | --- |")
    for name in arguments.only:
        found = [measure(arguments, name) for _ in range(arguments.repeats)]
        passes, rest, eigen, plain = (
            statistics.median(column) for column in zip(*found, strict=True)
        )
        record["variants"][name] = {
            "passes": passes, "run_over_passes": rest / plain, "eigen_over_passes": eigen / plain,
        }  # fmt: skip
        print(f"| {name} | {passes:.0f} | {rest / plain:.2f} | {eigen / plain:.2f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(arguments, name: str) -> tuple[int, float, float, float]:
    """Number of passes; seconds of a run without eigen-decompositions, of those, and of as many
    plain passes."""
    model = build(arguments.size, "cpu", torch.float32)
    windows_BT = calibration_for(model, arguments.windows).draw()
    plain_pass(model, windows_BT[:8], False)  # warm-up
    began = now("cpu")
    plain_pass(model, windows_BT, name in NEED_LOSS)
    one = now("cpu") - began
    work = make_work(model, arguments.windows, VARIANTS[name])
    entered, eigen, original = [0], [0.0], torch.linalg.eigh

    def enters(module, args):
        entered[0] += args[0].numel()

    def timed(*args):
        start = now("cpu")
        result = original(*args)
        eigen[0] += now("cpu") - start
        return result

    handle = model.get_input_embeddings().register_forward_pre_hook(enters)
    torch.linalg.eigh = timed
    began = now("cpu")
    try:
        for _ in method_named(work.settings.method).run(work):
            pass
    finally:
        torch.linalg.eigh = original
        handle.remove()
    seconds = now("cpu") - began
    passes = round(entered[0] / windows_BT.numel())
    return passes, seconds - eigen[0], eigen[0], passes * one


@torch.no_grad()
def plain_pass(model, windows_BT: torch.Tensor, with_loss: bool) -> None:
    for batch_BT in windows_BT.split(MICRO_BATCH_TOKENS["cpu"] // WINDOW):
        hidden_BTD = hidden_states(model, batch_BT)
        if with_loss:
            logits_NV = model.get_output_embeddings()(hidden_BTD[:, :-1]).flatten(0, 1)
            F.cross_entropy(logits_NV, batch_BT[:, 1:].flatten()).item()


def make_work(model, windows: int, values: dict) -> Work:
    anatomy, shape = find_anatomy(model), {}
    target = anatomy.total_parameters - anatomy.layer_parameters // 5
    if values["method"] == "minitron":
        shape = {"shape": f"hidden={anatomy.hidden_size},layers={len(anatomy.layers)},"
                 f"heads={anatomy.widths[0]['num_attention_heads']}"}  # fmt: skip
    settings = make_settings(**values, **shape, windows=windows, window_length=WINDOW)
    return Work(model, calibration_for(model, windows), (target,), settings)


if __name__ == "__main__":
    main()
