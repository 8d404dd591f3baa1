"""Two processes do what one does: the same statistics, the same cut, the same training."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from picomodels import VOCAB_SIZE

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(processes: int, arguments: list[object], cache: Path) -> None:
    """Run the command line in so many processes, as torchrun starts them."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "ADAPT_PRUNER_CACHE": str(cache),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "adapt_pruner", *map(str, arguments)]
    running = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        running.append(
            subprocess.Popen(command, env={**environment, **own}, stderr=subprocess.PIPE, text=True)
        )
    outcomes = [process.communicate(timeout=240) for process in running]
    for process, (_, err) in zip(running, outcomes, strict=True):
        assert process.returncode == 0, err[-3000:]


def accel(model: Path, text_file: Path, output: Path, *more: object) -> list[object]:
    return [
        "accel", model, "-o", output, "--data", text_file, "--calibration", text_file,
        "--sparsity", 0.4, "--tokens", 12 * 64, "--phases", 3, "--sequence-length", 16,
        "--batch-tokens", 64, "--repeat", "--learning-rate", 3e-3, "--moments", "carry",
        "--windows", 8, "--window-length", 12, "--steps", 3, "--device", "cpu", "--quiet", *more,
    ]  # fmt: skip


def compare(one: Path, two: Path) -> None:
    widths = [json.loads((run / "run.json").read_text())["widths_after"] for run in (one, two)]
    assert widths[0] == widths[1]
    record = json.loads((two / "run.json").read_text())["training"]
    assert record["processes"] == 2
    pruning = [json.loads((run / "pruning.json").read_text())["layers"] for run in (one, two)]
    assert pruning[0] == pruning[1]
    generation = [(run / "generation_config.json").read_text() for run in (one, two)]
    assert generation[0] == generation[1]
    assert '"top_k": 7' in generation[0]
    left, right = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=1e-3, rtol=1e-2)


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory) -> Path:
    """The tiny Llama, with a wish on how it generates."""
    place = tmp_path_factory.mktemp("model") / "llama"
    shutil.copytree(llama, place)
    GenerationConfig(top_k=7, do_sample=True).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def alone(model, text_file, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("alone")
    launch(1, accel(model, text_file, place / "run"), place / "cache")
    return place / "run"


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_prune_and_train_as_one(sharding, model, text_file, alone, tmp_path):
    arguments = accel(model, text_file, tmp_path / "run", "--sharding", sharding)
    launch(2, [*arguments, "--per-device-train-batch-size", 1], tmp_path / "cache")
    compare(alone, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_ask_the_teacher_and_go_on_with_a_run(model, text_file, alone, tmp_path):
    """All logits stored teach as a teacher that runs along, but for their rounding."""
    more = ("--sharding", "fsdp2", "--teacher-top-k", VOCAB_SIZE)
    arguments = accel(model, text_file, tmp_path / "run", *more)
    launch(2, [*arguments, "--stop-after", 2], tmp_path / "cache")
    assert not (tmp_path / "run" / "run.json").exists()
    assert len(list((tmp_path / "run" / "teacher").rglob("logits-*.safetensors"))) == 1
    launch(2, arguments, tmp_path / "cache")
    compare(alone, tmp_path / "run")
