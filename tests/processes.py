"""Several processes that torch.distributed connects: forks, which import nothing anew."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def in_processes(
    count: int, work: Callable[[int], Any], place: Path, connect: bool = True, seconds: float = 120
) -> list[Any]:
    """What `work(rank)` returns in each of so many processes.

    Args:
        place: directory for what they return.
        connect: initialise torch.distributed first; else `work` does, as accelerate does for it.

    Raises:
        AssertionError: with the traceback of a process that failed, or if one takes too long.
    """
    port, children = free_port(), {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _child(rank, count, port, work, place, connect)
        children[child] = rank
    end = time.monotonic() + seconds
    failed, waiting = [], dict(children)
    while waiting and time.monotonic() < end and not failed:
        for child in list(waiting):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                rank = waiting.pop(child)
                if status:
                    failed.append(rank)
        time.sleep(0.02)
    for child in waiting:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if failed:
        errors = [place / f"error-{rank}" for rank in failed]
        raise AssertionError("".join(file.read_text() for file in errors if file.exists()))
    assert not waiting, f"processes {sorted(waiting.values())} hang after {seconds} s"
    return [pickle.loads((place / f"result-{rank}").read_bytes()) for rank in range(count)]


def _child(
    rank: int, count: int, port: int, work: Callable[[int], Any], place: Path, connect: bool
) -> None:
    status = 1
    try:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        AcceleratorState._reset_state()
        PartialState._reset_state()
        if connect:
            torch.distributed.init_process_group("gloo")
        result = pickle.dumps(work(rank))
        (place / f"result-{rank}").write_bytes(result)
        status = 0
    except BaseException:
        (place / f"error-{rank}").write_text(f"process {rank}:\n{traceback.format_exc()}")
    finally:
        os._exit(status)
