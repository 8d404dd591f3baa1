"""Count how wrong calls end, and what kills leave: the figures of docs/reliability.md.

    PYTHONPATH=tests python benchmarks/reliability.py runs/reliability --kills 100

Takes the generators of the tests (`tests/wrong_values.py`, `tests/kill_points.py`) in full, in one
process after the other, on the CPU. Writes results.json and prints the two tables. `--resume` goes
on where it stopped; it takes an hour of one core.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from adapt_pruner.files import read_json, write_json
from adapt_pruner.methods import make_settings
from adapt_pruner.report import pictures
from adapt_pruner.run import Request, run_pruning
from conftest import WORDS, character_tokenizer
from killed_commands import COMMANDS, materials
from picomodels import build
from wrong_values import Call, judge, wrong_files, wrong_settings

TESTS = Path(__file__).parents[1] / "tests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="Points of each command.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="Go on with what OUTPUT has.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    root = given.output.resolve()
    if not given.resume:
        shutil.rmtree(root, ignore_errors=True)
        make_materials(root)
    file = root / "results.json"
    results: dict[str, Any] = read_json(file) if file.exists() else {"calls": {}}
    results.update(torch=torch.__version__, seed=given.seed)
    (root / "files").mkdir(exist_ok=True)
    calls = {
        "settings": lambda: wrong_settings(),
        "files": lambda: wrong_files(root / "files", root / "llama", root / "run"),
    }
    for kind, make in calls.items():
        if kind not in results["calls"]:
            results["calls"][kind] = count(make())
            write_json(file, results)
    print_calls(results["calls"])
    results["kills"] = [kill(command, root, given.kills, given.seed) for command in COMMANDS]
    write_json(file, results)
    print_kills(results["kills"])


def make_materials(root: Path) -> None:
    """Tiny models, texts and a run to damage."""
    root.mkdir(parents=True)
    documents = [" ".join(random.Random(i).choices(WORDS, k=30)) for i in range(40)]
    materials(root, build("llama", torch.float32), character_tokenizer(), documents)
    pictures.draw_all = lambda directory, result: {}
    settings = make_settings(
        calibration=str(root / "text.txt"), steps=1, windows=4, window_length=12
    )
    run_pruning(Request(str(root / "llama"), settings, sparsity=0.2), root / "run")


def count(calls: Iterable[Call]) -> dict[str, Any]:
    """How many calls ended in which way, and what was bad."""
    ended, bad, longest, began = Counter(), [], 0.0, time.perf_counter()
    for call in calls:
        start = time.perf_counter()
        verdict = judge(call)
        longest = max(longest, time.perf_counter() - start)
        ended[verdict.outcome] += 1
        if verdict.outcome == "bad":
            bad.append(f"{call.name}: {verdict.why}")
    return {
        "refused": ended["refused"], "passed": ended["passed"], "bad": bad,
        "longest_s": round(longest, 2), "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def kill(command: str, root: Path, points: int, seed: int) -> dict[str, Any]:
    """Kill a command at so many points; in a process of its own, of which it makes forks."""
    script = [sys.executable, str(TESTS / "kill_points.py"), command, str(root)]
    record = root / f"kills-{command}.jsonl"
    more = ["--points", str(points), "--seed", str(seed), "--record", str(record)]
    began = time.perf_counter()
    done = subprocess.run([*script, *more], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def print_calls(calls: dict[str, dict[str, Any]]) -> None:
    print("\n| wrong | calls | refused in a sentence | valid | bad | longest |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in calls.items():
        bad = len(found["bad"])
        total = found["refused"] + found["passed"] + bad
        print(
            f"| {name} | {total:,} | {found['refused']:,} | {found['passed']:,} | {bad} | "
            f"{found['longest_s']} s |"
        )


def print_kills(kills: list[dict[str, Any]]) -> None:
    print("\n| command | events | kills | not whole, or something left |")
    print("| --- | --- | --- | --- |")
    for found in kills:
        print(
            f"| {found.get('command')} | {found.get('events')} | {found.get('kills')} | "
            f"{len(found['bad'])} |"
        )


if __name__ == "__main__":
    main()
