"""What the presets made of the embedded model when this was last recorded, and what they make now.

    python tests/unchanged.py                 # write tests/unchanged.json anew, on purpose

A restructuring must leave every bit as it was. Bits depend on the processor and on torch, so they
are compared where both are those of the record; anywhere else the kept units are, of which rounding
moves a few.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from adapt_pruner import accel, load_model, load_tokenizer, prune
from adapt_pruner.recovery import finish
from adapt_pruner.report import pictures

RECORD = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
SMALL = {"calibration": "pydocs", "windows": 16, "window_length": 64, "max_documents": 100}
CASES = {
    "best": {"steps": 2, "tuning_steps": 2, "sparsity": 0.3},
    "paper": {"preset": "paper", "steps": 8, "sparsity": 0.3},
    "accel": {"steps": 2, "tuning_steps": 0, "sparsity": 0.3, "tokens": 2048, "data": "pydocs",
              "phases": 2, "sequence_length": 64, "batch_tokens": 512, "repeat": True},
}  # fmt: skip


def fingerprint() -> dict[str, str]:
    """What rounding depends on."""
    cpu = Path("/proc/cpuinfo")
    models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] \
        if cpu.exists() else []  # fmt: skip
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": models[0].partition(": ")[2] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def outcome(case: str, seed: int) -> dict[str, Any]:
    """Run a case. Returns the SHA-256 of all weights, and the units that stay, axis by axis."""
    options = {**CASES[case], **SMALL, "seed": seed}
    if case == "accel":
        with tempfile.TemporaryDirectory() as place:
            result = accel("demo", Path(place) / "out", **options).result
    else:
        model = load_model("demo")
        result = prune(model, load_tokenizer("demo"), **options)
    assert result is not None
    weights = hashlib.sha256()
    for name, parameter in result.model.named_parameters():
        weights.update(name.encode())
        weights.update(parameter.detach().contiguous().numpy().tobytes())
    kept = {}
    for edit in result.edits:
        for axis, entry in edit.record()["axes"].items():
            bits = sum(1 << unit for unit in entry["kept"])
            kept[axis] = f"{bits:x}"
    return {"weights": weights.hexdigest(), "kept": kept}


def share_of_units_kept_alike(one: dict[str, str], other: dict[str, str]) -> float:
    """Of all units that either keeps in an axis that both cut, the share that both keep; 0 if they
    cut different axes. Units are the bits of numbers, in hexadecimal digits."""
    if one.keys() != other.keys():
        return 0.0
    pairs = [(int(one[name], 16), int(other[name], 16)) for name in one]
    both, either = (
        sum((a & b).bit_count() for a, b in pairs),
        sum((a | b).bit_count() for a, b in pairs),
    )
    return both / either


def write() -> None:
    torch.set_num_threads(1)
    pictures.draw_all = lambda directory, result: {}
    finish.draw_training = lambda run, pictures: {}
    cases = {case: {str(seed): outcome(case, seed) for seed in SEEDS} for case in CASES}
    content = {"made on": fingerprint(), "cases": cases}
    RECORD.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
