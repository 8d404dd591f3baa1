"""What one pruning step costs beside one forward and backward pass, in the same run.

    python benchmarks/step_cost.py [--sizes 10M,100M,1B] [--variants taylor,best] [--device cpu]

Models have random weights. The unit of time is one forward and backward pass over the same
calibration windows with only the decoder layers' matrices requiring gradients; passes and steps are
timed in turns and compared by medians. A step is everything: the pass, scores, allocation, refit
and cut (5 % of the decoder layers). On the CPU seconds are those of the process, not of the clock,
so that other work on the machine does not count; use OMP_NUM_THREADS=1, since idle threads spin.

Memory is the weights and the most that tensors hold beside them at any one time, as PyTorch's
allocator reports it; each variant runs in a process of its own. The yardstick is a forward and
backward pass with and without weight gradients over two micro-batches: in the second one the
gradients of the first are there, as they are in a step. `resident` is what the system saw. glibc
keeps freed blocks of up to 32 MB for itself, which adds a quarter to steps and passes alike; for
the measurement it is told to return them (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from adapt_pruner.data import CalibrationData
from adapt_pruner.methods import METHODS, Work, make_settings
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.report.account import versions_used
from adapt_pruner.score.observers import matrices

SHAPES = {  # hidden size, MLP width, layers, query heads, KV heads
    "10M": (256, 704, 8, 8, 4),
    "100M": (768, 2048, 12, 12, 4),
    "1B": (2048, 5632, 20, 16, 8),
    "8B": (4096, 14336, 32, 32, 8),
}
AMOUNTS = {  # numbers of calibration windows, repeats
    "10M": ((64, 128), 3),
    "100M": ((32, 64), 1),
    "1B": ((4, 8), 1),
    "8B": ((256, 512), 3),
}
VOCABULARY = {"10M": 8192, "100M": 32000, "1B": 32000, "8B": 128256}
VARIANTS = {
    "taylor": {"importance": "taylor", "compensation": "none"},
    "activation-fisher": {"importance": "activation-fisher", "compensation": "none"},
    "best": {},
}
WINDOW = 64
MICRO_BATCH = 2048 // WINDOW


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
    wanted = (
        set(matrices(find_anatomy(model).of_kinds({"kv-groups", "neurons"}))) if weights else set()
    )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in wanted)
    if not weights:
        model.model.layers[0].register_forward_pre_hook(require_gradient)


def require_gradient(module, args) -> None:
    args[0].requires_grad_()


def one_step(model, windows: int, variant: str) -> float:
    """Make a step that cuts 5 % of the decoder layers. Returns its pass's share of the time."""
    settings = make_settings(**VARIANTS[variant], steps=1, windows=windows, window_length=WINDOW)
    anatomy = find_anatomy(model)
    target = anatomy.total_parameters - anatomy.layer_parameters // 20
    work = Work(model, calibration_for(model, windows), (target,), settings)
    (step,) = METHODS["adapt-pruner"].run(work)
    return step.seconds["collect"] / sum(step.seconds.values())


def now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def time_size(size: str, windows: int, variants: list[str], device: str, dtype) -> dict:
    """Seconds of the yardstick and of a step of each variant, in turns."""
    passes: list[float] = []
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(AMOUNTS[size][1]):
        for name in variants:
            model = build(size, device, dtype)
            parameters = find_anatomy(model).total_parameters
            only_matrices_require_gradients(model, weights=True)
            windows_BT = calibration_for(model, windows).draw()
            if not passes:
                pass_over(model, windows_BT[:1], 1)  # warm-up
            began = now(device)
            pass_over(model, windows_BT, MICRO_BATCH)
            passed = now(device)
            passes.append(passed - began)
            share = one_step(model, windows, name)
            steps[name].append((now(device) - passed, share))
            del model
    yardstick = statistics.median(passes)
    per = parameters * windows * WINDOW / 1e9
    record = {"size": size, "parameters": parameters, "tokens": windows * WINDOW,
              "pass_s": yardstick, "pass_ns_per_parameter_and_token": yardstick / per,
              "variants": {}}  # fmt: skip
    for name, found in steps.items():
        total = statistics.median(seconds for seconds, _ in found)
        record["variants"][name] = {
            "step_over_pass": total / yardstick,
            "collect_over_pass": statistics.median(s * share for s, share in found) / yardstick,
            "ns_per_parameter_and_token": total / per,
        }
    return record


def print_time(records: list[dict], variants: list[str]) -> None:
    """Ratios, and whether cost is linear: then time per parameter and token is the same."""
    columns = ["pass", *variants]
    print("| size | tokens |", *(f"{v} / pass |" for v in variants), end=" ")
    print(*(f"{c}, ns per parameter and token |" for c in columns))
    print("| --- " * (2 + len(variants) + len(columns)) + "|")
    for r in records:
        found = r["variants"].values()
        ratios = [f"{v['step_over_pass']:.2f}" for v in found]
        costs = [r["pass_ns_per_parameter_and_token"]]
        costs += [v["ns_per_parameter_and_token"] for v in found]
        cells = [r["size"], f"{r['tokens']:,}", *ratios, *(f"{cost:.3f}" for cost in costs)]
        print("| " + " | ".join(cells) + " |")


def measure_peak(size: str, variant: str, device: str, dtype: str, what: str) -> None:
    """Print the peak bytes of one step, or one pass, in this process."""
    before = resident_bytes("VmRSS")
    model = build(size, device, getattr(torch, dtype))
    windows = 2 * MICRO_BATCH

    def work() -> None:
        if variant.startswith("pass"):
            only_matrices_require_gradients(model, weights=variant == "pass")
            pass_over(model, calibration_for(model, windows).draw(), MICRO_BATCH)
        else:
            one_step(model, windows, variant)

    if device != "cpu":
        work()
        print(torch.cuda.max_memory_allocated())
    elif what == "resident":
        work()
        print(resident_bytes("VmHWM") - before)
    else:
        weights = sum(p.nbytes for p in model.parameters())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            work()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        print(weights + max(accumulate(event.nbytes() for event in events)))


def resident_bytes(name: str) -> int:
    # Not ru_maxrss: a process inherits that of its parent.
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc").exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def memory_of(size: str, variants: list[str], device: str, dtype: str) -> dict:
    """Peak bytes of a step, and over that of the pass that needs the same gradients."""
    record: dict = {"size": size, "windows": 2 * MICRO_BATCH}
    for what in ("tensors", "resident") if device == "cpu" else ("tensors",):
        peaks = {}
        for variant in ("pass", "pass-no-weights", *variants):
            command = [sys.executable, __file__, "--measure", size, variant, device, dtype, what]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
            output = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            peaks[variant] = int(output.split()[-1])
        ratios = {}
        for variant in variants:
            yardstick = "pass" if variant == "taylor" else "pass-no-weights"
            ratios[f"{variant} over {yardstick}"] = peaks[variant] / peaks[yardstick]
        record[what] = {"peak_bytes": peaks, "ratios": ratios}
        for name, ratio in ratios.items():
            print(f"{size:>5} memory, {what}: {name} {ratio:.2f}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10M,100M,1B")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_peak(*arguments.measure)
        return
    sizes, variants = arguments.sizes.split(","), arguments.variants.split(",")
    device, dtype = arguments.device, arguments.dtype
    results: dict = {"versions": versions_used(), "device": device, "dtype": dtype,
                     "threads": torch.get_num_threads(), "time": [], "memory": []}  # fmt: skip

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for size in sizes:
        if arguments.only != "memory":
            for windows in AMOUNTS[size][0]:
                record = time_size(size, windows, variants, device, getattr(torch, dtype))
                results["time"].append(record)
                save()
        if arguments.only != "time":
            results["memory"].append(memory_of(size, variants, device, dtype))
            save()
    print_time(results["time"], variants)


if __name__ == "__main__":
    main()
