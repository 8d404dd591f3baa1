"""What one pruning step costs beside one forward and backward pass, in the same run.

    python benchmarks/step_cost.py [--sizes 10M,100M,1B] [--device cpu] [--json FILE]

Models have random weights. The unit of time is one forward and backward pass over the same
calibration windows with only the decoder layers' matrices requiring gradients; passes and steps are
timed in turns and compared by medians. A step is everything: the pass, scores, allocation, refit
and cut (5 % of the decoder layers). Peak memory is that of a process of its own for each variant,
beside a process that makes one such pass over one micro-batch, with and without weight gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from adapt_pruner.anatomy import find_anatomy
from adapt_pruner.data import CalibrationData
from adapt_pruner.methods import METHODS
from adapt_pruner.report.account import versions
from adapt_pruner.settings import make_settings
from adapt_pruner.statistics import prunable_matrices

SHAPES = {  # hidden size, MLP width, layers, query heads, KV heads
    "10M": (256, 704, 8, 8, 4),
    "100M": (768, 2048, 12, 12, 4),
    "1B": (2048, 5632, 20, 16, 8),
    "8B": (4096, 14336, 32, 32, 8),
}
VOCABULARY = {"10M": 8192, "100M": 32000, "1B": 32000, "8B": 128256}
VARIANTS = {
    "taylor": {"importance": "taylor", "compensation": "none"},
    "activation-fisher": {"importance": "activation-fisher", "compensation": "none"},
    "best": {},
}
WINDOW = 64


def build(size: str, device: str, dtype: torch.dtype):
    hidden, width, layers, heads, kv_heads = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=VOCABULARY[size],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def calibration_for(model, windows: int) -> CalibrationData:
    tokens = torch.randint(model.config.vocab_size, (windows * WINDOW * 2,), dtype=torch.int32)
    return CalibrationData([tokens], WINDOW, windows)


def pass_over(model, windows_BT: torch.Tensor, micro_batch: int) -> None:
    """The yardstick: forward and backward, gradients of whatever requires them."""
    for batch_BT in windows_BT.split(micro_batch):
        batch_BT = batch_BT.to(model.device)
        model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


def only_matrices_require_gradients(model, weights: bool) -> None:
    wanted = set(prunable_matrices(find_anatomy(model))) if weights else set()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in wanted)
    if not weights:
        model.model.layers[0].register_forward_pre_hook(require_gradient)


def require_gradient(module, args) -> None:
    args[0].requires_grad_()


def one_step(model, windows: int, variant: str) -> dict[str, float]:
    """A step that cuts 5 % of the decoder layers; seconds of its two halves."""
    settings = make_settings(**VARIANTS[variant], steps=1, windows=windows, window_length=WINDOW)
    anatomy = find_anatomy(model)
    target = anatomy.total_parameters - anatomy.layer_parameters // 20
    (step,) = METHODS["adapt-pruner"](model, calibration_for(model, windows), target, settings)
    return step.seconds


def now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_size(size: str, windows: int, repeats: int, device: str, dtype: torch.dtype) -> dict:
    """Seconds of the yardstick and of a step of each variant, in turns."""
    passes: list[float] = []
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(repeats):
        for name in VARIANTS:
            model = build(size, device, dtype)
            only_matrices_require_gradients(model, weights=True)
            windows_BT = calibration_for(model, windows).draw()
            if not passes:
                pass_over(model, windows_BT[:4], 4)  # warm-up
            began = now(device)
            pass_over(model, windows_BT, 2048 // WINDOW)
            passes.append(now(device) - began)
            steps[name].append(one_step(model, windows, name))
            parameters = find_anatomy(model).total_parameters
            del model
    yardstick = statistics.median(passes)
    record = {"size": size, "parameters_after": parameters, "tokens": windows * WINDOW,
              "pass_s": yardstick, "variants": {}}  # fmt: skip
    for name, found in steps.items():
        collect = statistics.median(s["collect"] for s in found)
        total = statistics.median(s["collect"] + s["cut"] for s in found)
        record["variants"][name] = {
            "collect_over_pass": collect / yardstick,
            "step_over_pass": total / yardstick,
        }
    return record


def peak_of(size: str, variant: str, device: str, dtype: str) -> int:
    """Peak bytes of a fresh process that makes one step, or one pass."""
    command = [sys.executable, __file__, "--measure", size, variant, device, dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_here(size: str, variant: str, device: str, dtype: str) -> None:
    model = build(size, device, getattr(torch, dtype))
    if variant.startswith("pass"):
        only_matrices_require_gradients(model, weights=variant == "pass")
        pass_over(model, calibration_for(model, 32).draw(), 2048 // WINDOW)
    else:
        one_step(model, 64, variant)
    if device == "cpu":
        # Not ru_maxrss: a process inherits that of its parent.
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
        print(int(line.split()[1]) * 1024)
    else:
        print(torch.cuda.max_memory_allocated())


def memory_of(size: str, device: str, dtype: str) -> dict:
    """Peak memory of a step over that of the pass that needs the same gradients."""
    idle = 0 if device != "cpu" else 350_000_000  # interpreter and libraries, not the model's
    peaks = {
        v: peak_of(size, v, device, dtype) - idle for v in ("pass", "pass-no-weights", *VARIANTS)
    }
    return {
        "size": size,
        "peak_bytes": peaks,
        "taylor_over_pass": peaks["taylor"] / peaks["pass"],
        "activation_fisher_over_pass_without_weight_gradients": peaks["activation-fisher"]
        / peaks["pass-no-weights"],
        "best_over_pass": peaks["best"] / peaks["pass"],
        "best_over_pass_without_weight_gradients": peaks["best"] / peaks["pass-no-weights"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10M,100M,1B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_here(*arguments.measure)
        return
    amount = {"10M": (128, 3), "100M": (64, 1), "1B": (16, 1), "8B": (512, 3)}
    results: dict = {"versions": versions(), "device": arguments.device, "time": [], "memory": []}
    for size in arguments.sizes.split(","):
        windows, repeats = amount[size]
        dtype = getattr(torch, arguments.dtype)
        record = time_size(size, windows, repeats, arguments.device, dtype)
        results["time"].append(record)
        print(f"{size:>5} {record['tokens']:>6} tokens, pass {record['pass_s']:.2f} s; over it:")
        for name, ratios in record["variants"].items():
            print(f"      {name:18} pass {ratios['collect_over_pass']:.2f}, "
                  f"whole step {ratios['step_over_pass']:.2f}")  # fmt: skip
        memory = memory_of(size, arguments.device, arguments.dtype)
        results["memory"].append(memory)
        for name, value in memory.items():
            if name.endswith(("pass", "gradients")):
                print(f"      memory {name}: {value:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
