"""Tokens per second of recovery training over those of a bare PyTorch loop, in the same run.

    python benchmarks/training_overhead.py [--model demo] [--steps 30] [--json FILE]

Same model, windows, batch, precision and optimizer; stretches of both are timed in turns and
compared by their medians. Our loop does what it does in a run: draw windows from the packed data,
sum losses by domain, clip, check for spikes, write the log. A phase change is a cut with its
calibration passes; its cost is given in seconds, since a phase is as long as the user makes it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from adapt_pruner import load_model
from adapt_pruner.data.sampling import WindowSampler
from adapt_pruner.methods import make_settings
from adapt_pruner.recovery.launch import make_accelerator
from adapt_pruner.recovery.materials import gather
from adapt_pruner.recovery.request import AccelListener, AccelRequest
from adapt_pruner.recovery.run import Run
from adapt_pruner.recovery.settings import make_recovery_settings
from adapt_pruner.recovery.state import RunDirectory
from adapt_pruner.recovery.training import SpikeGuard, training
from adapt_pruner.report.account import versions_used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="pydocs")
    parser.add_argument("--steps", type=int, default=8, help="steps per stretch")
    parser.add_argument("--stretches", type=int, default=7)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=4, help="windows")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recovery = make_recovery_settings(
        phases=1, sequence_length=256, batch_tokens=arguments.batch_tokens, repeat=True, alpha=0.0,
        per_device_train_batch_size=arguments.micro_batch, learning_rate=1e-4,
    )  # fmt: skip
    total = arguments.steps * (arguments.stretches + 1) * arguments.batch_tokens
    request = AccelRequest(
        arguments.model, arguments.data, total, make_settings(calibration=arguments.data),
        recovery, sparsity=0.05,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(results := measure(request, Path(directory), arguments), indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(request: AccelRequest, directory: Path, arguments) -> dict:
    from contextlib import ExitStack

    with ExitStack() as stack:
        accelerator = make_accelerator(request, directory, stack)
        materials = gather(request, accelerator, AccelListener())
        run = Run(request, RunDirectory(directory, request.recipe()), materials, AccelListener())
        bare = BareLoop(request, materials.data)
        (phase,) = run.phases
        ours, bares, guard = [], [], SpikeGuard(3.0)
        with training(accelerator, run.model, {}, request.recovery) as work:
            for stretch in range(arguments.stretches + 1):
                began = time.perf_counter()
                for _ in range(arguments.steps):
                    rate = run.rate_at(run.progress.step)
                    found = run._step(work, phase, guard, rate)
                    run._log(phase, found, rate, 1.0)
                middle = time.perf_counter()
                bare.take(arguments.steps)
                end = time.perf_counter()
                if stretch:  # the first is a warm-up
                    ours.append(middle - began)
                    bares.append(end - middle)
    ratios = [b / o for o, b in zip(ours, bares, strict=True)]
    tokens = arguments.steps * arguments.batch_tokens
    return {
        "versions": versions_used(),
        "tokens_per_second": tokens / statistics.median(ours),
        "bare_tokens_per_second": tokens / statistics.median(bares),
        "ours_over_bare": statistics.median(ratios),
        "spread_of_ratios": [min(ratios), max(ratios)],
    }


class BareLoop:
    """What one would write for this one model: windows from a tensor, AdamW, clipping."""

    def __init__(self, request: AccelRequest, data):
        self.model = load_model(request.model).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        sampler, self.settings = WindowSampler(data, 1), request.recovery
        windows = min(512, data.domains[0].num_windows)
        self.windows_BT = sampler.next(windows).input_ids
        self.next = 0

    def take(self, steps: int) -> None:
        settings = self.settings
        count = settings.batch_tokens // settings.sequence_length
        size = settings.per_device_train_batch_size or count
        for _ in range(steps):
            if self.next + count > len(self.windows_BT):
                self.next = 0
            batch_BT = self.windows_BT[self.next : self.next + count]
            self.next += count
            for ids_BT in batch_BT.split(size):
                logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
                loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
                (loss * len(ids_BT) / count).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
