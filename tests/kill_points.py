"""Kill a command at seeded points of its work on files, and look at what is left.

    python tests/kill_points.py prune WORKPLACE --points 100 --seed 0

Python tells an audit hook of every file that is opened, renamed, made or removed. The command runs
once to count these events below the workplace, then once for each point drawn, and kills itself
(SIGKILL: nothing is tidied up) at that event. After each kill the output must be whole, the old one
or the new one; then the same command runs to its end, and nothing half-written may be left.

Processes are forks of one that has imported everything, which takes most of the time; so several
commands in one call take less. Prints a line of JSON for each command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch

from adapt_pruner.cli import main
from adapt_pruner.recovery import finish
from adapt_pruner.report import pictures
from killed_commands import COMMANDS, Workplace

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def forked(work: Callable[[], int]) -> int:
    """Run in a child. Returns its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        status = work()
    finally:
        os._exit(status)


def run_command(place: Workplace, count_to: Path | None = None, die_at: int = 0) -> int:
    """Run the command in this process, which is a fork, and count its events or die at one."""
    root, seen = str(place.root), [0]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and arguments and str(arguments[0]).startswith(root):
            seen[0] += 1
            if seen[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    with (place.root / "output.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.addaudithook(hook)
    try:
        main(place.arguments())
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    if count_to is not None:
        die_at = -1
        count_to.write_text(str(seen[0]))
    return status


def kill_points(
    place: Workplace, points: int, seed: int, record: Path | None = None
) -> dict[str, object]:
    """Run it `points` times. Returns the number of events, of kills, and what was bad.

    Args:
        record: file of a line for each kill; those that it has already are not made again.
    """
    place.fresh()
    counted = place.root / "count.txt"
    status = forked(lambda: run_command(place, counted))
    if status:
        return {
            "command": place.command,
            "bad": [f"unharmed run: {status}: {(place.root / 'output.txt').read_text()}"],
        }
    events = int(counted.read_text())
    drawn = sorted(random.Random(seed).sample(range(1, events + 1), min(points, events)))
    done = [json.loads(line) for line in _lines(record)]
    for point in drawn:
        if point not in [one["point"] for one in done]:
            done.append({"point": point, **kill_at(place, point)})
            if record is not None:
                with record.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(done[-1]) + "\n")
    bad = [f"{place.command}, event {one['point']}: {one['wrong']}" for one in done if one["wrong"]]
    kills = sum(one["is_killed"] for one in done)
    return {"command": place.command, "events": events, "kills": kills, "bad": bad}


def kill_at(place: Workplace, point: int) -> dict[str, object]:
    """Kill the command at an event, look, and run it to its end."""
    place.fresh()
    status = forked(lambda: run_command(place, die_at=point))
    try:
        wrong = place.is_whole()
        again = forked(lambda: run_command(place))
        if again:
            wrong += f" again: {again}: {(place.root / 'output.txt').read_text()}"
        wrong = wrong or place.is_whole() or " ".join(place.leftovers())
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
    return {"is_killed": status == -signal.SIGKILL, "wrong": wrong[:400]}


def _lines(record: Path | None) -> list[str]:
    if record is None or not record.exists():
        return []
    return record.read_text(encoding="utf-8").splitlines()


def prepare(place: Workplace) -> None:
    """Make what is to be replaced."""
    if place.makes_old and not place.old.exists():
        place.fresh()
        arguments = place.arguments(is_old=True)
        status = forked(lambda: _quietly(arguments, place.root / "output.txt"))
        assert status == 0, (place.root / "output.txt").read_text()
        os.replace(place.root / "work", place.old)


def _quietly(arguments: list[str], file: Path) -> int:
    with file.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def run() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("commands", help=f"of {', '.join(COMMANDS)}, with commas")
    parser.add_argument("root", type=Path, help="holds what `materials` makes")
    parser.add_argument("--points", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="file to go on with, a line for each kill")
    given = parser.parse_args()
    os.environ["ADAPT_PRUNER_CACHE"] = str(given.root / "cache")
    torch.set_num_threads(1)
    pictures.draw_all = lambda directory, result: {}  # they take half of the time
    finish.draw_training = lambda run, pictures: {}
    places = [COMMANDS[name](given.root.resolve()) for name in given.commands.split(",")]
    for place in places:
        place.before_forks()
    for place in places:
        prepare(place)
        print(json.dumps(kill_points(place, given.points, given.seed, given.record)))


if __name__ == "__main__":
    run()
