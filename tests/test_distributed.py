"""Two processes do what one does: the same statistics, the same cut, the same training."""

from __future__ import annotations

import gc
import json
import shutil
import time
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import GenerationConfig

from adapt_pruner import prune
from adapt_pruner.allocate import masks
from adapt_pruner.compensate import refit
from adapt_pruner.data.sampling import Batch
from adapt_pruner.methods import make_settings
from adapt_pruner.recovery import finish as finishing
from adapt_pruner.recovery import launch, run
from adapt_pruner.recovery.accel import run_accel
from adapt_pruner.recovery.request import AccelRequest
from adapt_pruner.recovery.settings import RecoverySettings, make_recovery_settings
from adapt_pruner.recovery.training import training
from adapt_pruner.report import pictures
from adapt_pruner.score.importance import IMPORTANCES
from picomodels import VOCAB_SIZE, build, random_tokens
from processes import in_processes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


@pytest.fixture(scope="module")
def model(llama, tmp_path_factory) -> Path:
    """The tiny Llama, with a wish on how it generates."""
    place = tmp_path_factory.mktemp("model") / "llama"
    shutil.copytree(llama, place)
    GenerationConfig(top_k=7, do_sample=True).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def request_(model, text_file, tmp_path_factory) -> AccelRequest:
    """Three phases of 2, 4 and 6 steps of 4 windows."""
    settings = make_settings(
        calibration=str(text_file), windows=8, window_length=12, steps=3, device="cpu"
    )
    recovery = make_recovery_settings(
        phases=3, sequence_length=16, batch_tokens=64, repeat=True, learning_rate=3e-3,
        moments="carry", final_share=0.0,
    )  # fmt: skip
    return AccelRequest(
        str(model), str(text_file), 12 * 64, settings, recovery, sparsity=0.4,
        data_cache=tmp_path_factory.mktemp("cache"),
    )  # fmt: skip


def with_training(request: AccelRequest, **changes: Any) -> AccelRequest:
    known = request.recovery.model_dump(exclude_unset=True)
    return replace(request, recovery=RecoverySettings(**{**known, **changes}))


def with_settings(request: AccelRequest, **changes: Any) -> AccelRequest:
    return replace(request, settings=request.settings.model_copy(update=changes))


def accel(request: AccelRequest, output: Path, processes: int = 2) -> Path:
    """Run in so many processes; returns the directory."""
    place = output.with_name(f"{output.name}-processes")
    place.mkdir()

    def work(rank: int) -> str:
        return run_accel(request, output).stopped

    in_processes(processes, work, place, connect=False)
    return output


@pytest.fixture(scope="module")
def alone(request_, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_all", lambda directory, result: {})
        patch.setattr(finishing, "draw_training", lambda run, pictures: {})
        place = tmp_path_factory.mktemp("alone") / "run"
        assert run_accel(request_, place).result is not None
    return place


def logged(place: Path, what: str, steps: int | None = None) -> list[float]:
    lines = (place / "training.jsonl").read_text().splitlines()[:steps]
    return [json.loads(line)[what] for line in lines]


def compare(one: Path, two: Path, processes: int = 2) -> None:
    """Gradients above all: AdamW hardly shows it when all of them are doubled."""
    for what, tolerance in (("loss", 1e-4), ("grad_norm", 2e-3), ("tokens", 0)):
        assert logged(two, what) == pytest.approx(logged(one, what), rel=tolerance), what
    widths = [json.loads((run / "run.json").read_text())["widths_after"] for run in (one, two)]
    assert widths[0] == widths[1]
    record = json.loads((two / "run.json").read_text())["training"]
    assert record["processes"] == processes
    pruning = [json.loads((run / "pruning.json").read_text())["edits"] for run in (one, two)]
    assert pruning[0] == pruning[1]
    generation = [(run / "generation_config.json").read_text() for run in (one, two)]
    assert generation[0] == generation[1]
    assert '"top_k": 7' in generation[0]
    left, right = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_prune_and_train_as_one(sharding, request_, alone, tmp_path):
    request = with_training(request_, sharding=sharding, per_device_train_batch_size=1)
    compare(alone, accel(request, tmp_path / "run"))


def test_two_processes_ask_the_teacher_and_go_on_with_a_run(request_, alone, tmp_path):
    """All logits stored teach as a teacher that runs along, but for their rounding."""
    request = with_training(request_, sharding="fsdp2", teacher_top_k=VOCAB_SIZE)
    accel(replace(request, stop_after=2), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    assert len(list((tmp_path / "run" / "teacher").rglob("logits-*.safetensors"))) == 1
    shutil.rmtree(tmp_path / "run-processes")
    compare(alone, accel(request, tmp_path / "run"))


def test_sharded_run_recomputes_activations_and_goes_on_inside_a_phase(
    request_, alone, tmp_path, monkeypatch
):
    request = with_training(request_, sharding="fsdp2")
    request = replace(with_settings(request, gradient_checkpointing=True), max_hours=1000.0)
    with monkeypatch.context() as patch:
        taken = [0]

        def out_of_time(self) -> bool:
            taken[0] += 1
            return taken[0] > 4  # phases ask once, steps once: inside the second phase

        patch.setattr(run.Run, "is_out_of_time", out_of_time)
        accel(request, tmp_path / "run")
    assert 2 < len(logged(tmp_path / "run", "loss")) < 6
    shutil.rmtree(tmp_path / "run-processes")
    compare(alone, accel(request, tmp_path / "run"))


def test_sharded_training_in_bfloat16(request_, tmp_path):
    """Sharded or not, the same is rounded: the two differ by a rounding error of bfloat16."""
    request = with_training(request_, mixed_precision="bf16", alpha=0.0, phases=1)
    one, two = tmp_path / "one", tmp_path / "two"
    run_accel(request, one)
    accel(with_training(request, sharding="fsdp2"), two)
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=5e-3)
    assert logged(two, "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=3e-2)
    assert load_file(two / "model.safetensors")["lm_head.weight"].dtype == torch.float32


def test_lora_on_two_processes(request_, tmp_path):
    options = {"lora_rank": 2, "lora_dropout": 0.0, "moments": "reset", "alpha": 0.0}
    request = with_training(request_, **options)
    run_accel(request, tmp_path / "one")
    compare(tmp_path / "one", accel(request, tmp_path / "two"))
    left = load_file(tmp_path / "two" / "model.safetensors")
    assert not [name for name in left if "lora" in name]


def test_dropout_differs_between_processes_and_goes_on_with_a_run(request_, tmp_path):
    """Each process has random numbers of its own, before and after a resume."""
    options = {"lora_rank": 2, "lora_dropout": 0.5, "moments": "reset", "alpha": 0.0}
    request = with_training(request_, **options)
    whole = accel(request, tmp_path / "whole")
    for number, hours in enumerate((1e-9, None)):
        place = tmp_path / f"part-{number}-processes"
        place.mkdir()

        def work(rank: int, hours=hours) -> list[float]:
            limited = replace(request, stop_after=1 if hours else None)
            run_accel(limited, tmp_path / "parts")
            return torch.rand(3).tolist()

        first, second = in_processes(2, work, place, connect=False)
        assert first != second
    left = load_file(whole / "model.safetensors")
    right = load_file(tmp_path / "parts" / "model.safetensors")
    assert all(torch.equal(left[name], right[name]) for name in left)


def pruned(rank: int, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    from adapt_pruner import CalibrationData

    found = build("llama", torch.float32)
    data = CalibrationData(random_tokens(20, 30), window_length=12, num_windows=8)
    few = {} if "method" in options else {"steps": 2, "tuning_steps": 2}
    result = prune(found, sparsity=0.4, calibration=data, **{**few, **options})
    return found.state_dict(), result.widths_after


def test_a_call_on_one_process_is_its_own(tmp_path):
    """torch.distributed is initialised, but the second process never calls."""

    def work(rank: int) -> Any:
        return pruned(rank) if rank == 0 else time.sleep(1)

    (weights, widths), _ = in_processes(2, work, tmp_path, seconds=30)
    expected, expected_widths = pruned(0)
    assert widths == expected_widths
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("preset", ["best", "paper"])
def test_first_process_decides_for_one_that_rounds_otherwise(preset, tmp_path):
    """The second one's scores and refits are off by far more than rounding."""

    def work(rank: int) -> Any:
        if rank == 1:
            importance = IMPORTANCES[getattr(make_settings(preset), "importance")]  # noqa: B009
            original, factorise = importance.score, refit.factorise
            noisy = lambda *args: original(*args) * (0.5 + torch.rand(args[0].num_units))  # noqa: E731
            object.__setattr__(importance, "score", noisy)
            refit.factorise = lambda matrix: factorise(matrix) * 0.9
        group = torch.distributed.group.WORLD
        return pruned(rank, group=group, preset=preset)

    (first, widths), (second, others) = in_processes(2, work, tmp_path)
    assert widths == others
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_others_wait_long_while_data_are_prepared_and_not_for_a_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "PATIENCE", timedelta(seconds=2))

    def work(rank: int) -> tuple[float, float]:
        with launch.ExitStack() as stack:
            request: Any = SimpleNamespace(
                settings=SimpleNamespace(device="cpu"), report_to=(),
                recovery=SimpleNamespace(mixed_precision="no"),
            )  # fmt: skip
            accelerator = launch.make_accelerator(request, tmp_path, stack)
            began = time.monotonic()
            with launch.first_alone(accelerator):
                prepared = time.monotonic() - began
                if rank == 0:
                    time.sleep(4)
            accelerator.wait_for_everyone()
            began = time.monotonic()
            if rank == 0:
                with pytest.raises(RuntimeError):
                    accelerator.wait_for_everyone()
            else:
                time.sleep(5)  # it hangs
            return prepared, time.monotonic() - began

    (_, hung), (waited, _) = in_processes(2, work, tmp_path, connect=False, seconds=40)
    assert waited > 3.5
    assert hung < 4.5


def test_sharded_model_is_gone_after_its_phase(request_, model, tmp_path):
    def work(rank: int) -> list[bool]:
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True)
        gc.disable()
        settings = make_recovery_settings(sharding="fsdp2", batch_tokens=32, sequence_length=16)
        holder: Any = SimpleNamespace(
            accelerator=accelerator, model=build("llama", torch.float32), moments={},
            recovery=settings, sampler=SimpleNamespace(weights=[1.0]), _is_sharded=True,
            request=request_, progress=SimpleNamespace(step=0), _save=None, clock=run._Clock(),
            is_out_of_time=lambda: False, rate_at=lambda step: 1e-3, batch_tokens=32,
            _log=lambda *args: None, masks=None,
        )  # fmt: skip
        ids = torch.randint(3, 90, (1, 16))

        def step(work, phase, guard, rate):
            holder.progress.step += 1
            return work.step(Batch(ids, ids, torch.zeros(1, dtype=torch.int64)), rate)

        holder._step = step
        alive = [weakref.ref(holder.model)]
        alive += [weakref.ref(parameter) for parameter in holder.model.parameters()]
        run.Run.train(holder, SimpleNamespace(end_step=1, trains_masks=False))  # type: ignore[arg-type]
        return [reference() is None for reference in alive]

    for gone in in_processes(2, work, tmp_path):
        assert all(gone)


def test_training_leaves_with_what_it_was_given(tmp_path):
    """`training` hands the whole model back, on every process."""

    def work(rank: int) -> dict[str, torch.Tensor]:
        AcceleratorState._reset_state()
        accelerator, whole = Accelerator(cpu=True), build("llama", torch.float32)
        settings = make_recovery_settings(sharding="fsdp2", batch_tokens=32, sequence_length=16)
        with training(accelerator, whole, {}, settings) as phase:
            pass
        return phase.model.state_dict()

    expected = build("llama", torch.float32).state_dict()
    for found in in_processes(2, work, tmp_path):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def masks_at_one_place(monkeypatch):
    """Random masks differ from process to process; these are all drawn with one number."""
    gate = masks.gate
    monkeypatch.setattr(masks, "gate", lambda a, u: gate(a, torch.full_like(u, 0.02)))
    monkeypatch.setattr(masks, "TOLERANCE", 1.0)


def test_masks_on_two_processes(request_, masks_at_one_place, tmp_path):
    settings = make_settings(
        method="sheared-llama", calibration=request_.settings.calibration, window_length=12,
        mask_share=0.5, device="cpu",
    )  # fmt: skip
    request = replace(request_, settings=settings)
    request = replace(request, recovery=with_training(request, alpha=0.0, phases=None).recovery)
    run_accel(request, tmp_path / "one")
    compare(tmp_path / "one", accel(request, tmp_path / "two"))
    assert logged(tmp_path / "two", "masked/hidden", 6)[-1] > 0


def test_masks_of_a_call_by_two_processes(masks_at_one_place, tmp_path):
    options = {"method": "sheared-llama", "steps": 6}

    def work(rank: int) -> Any:
        return pruned(rank, group=torch.distributed.group.WORLD, **options)

    (one, _), (two, _) = in_processes(2, work, tmp_path, seconds=60)
    expected, _ = pruned(0, **options)
    for name, tensor in expected.items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], tensor, atol=1e-3, rtol=1e-2)
