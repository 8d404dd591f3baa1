"""Adapt-Accel (arXiv:2502.03460, section 3.2): prune a little, train, and again, to the target."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..api import Listener, previous_record, prune
from ..claims import claimed
from ..data.sampling import updated_weights
from ..errors import Interrupted, NonFiniteError
from ..methods import make_settings
from ..model.anatomy import Anatomy, find_anatomy
from ..model.edits import Edit
from ..model.history import History
from ..result import PruningResult, Size, StepRecord
from ..run import default_calibration, measure, protocol
from ..settings import PruneSettings
from .finish import draw_progress, write_result
from .launch import make_accelerator, start_trackers
from .lora import add_lora, merge_lora
from .materials import Materials, gather, make_teacher, reference_losses
from .moments import Moments
from .request import AccelListener, AccelOutcome, AccelRequest, check_together
from .schedule import Phase, learning_rates, tokens_per_step
from .settings import RecoverySettings, make_recovery_settings
from .state import Progress, RunDirectory, rebuild_model, restore_random_states
from .teacher import set_aside
from .training import PhaseTraining, SpikeGuard, StepResult, Throughput, training


def accel(
    model: str,
    output: str | Path,
    *,
    data: str,
    tokens: int,
    sparsity: float | None = None,
    params: int | None = None,
    preset: str | None = None,
    listener: AccelListener | None = None,
    **options: Any,
) -> AccelOutcome:
    """Prune and train a model in turns: `accel("demo", "out", data="pydocs", tokens=10**6, ...)`.

    Args:
        model: a name on the hub, a directory, or "demo".
        output: directory of the run; the result is loaded from it.
        data: training text or a mixture, see `read_mixture`.
        tokens: to train on in all.
        sparsity, params, preset: as in `prune`.
        options: fields of `AccelRequest`, `RecoverySettings` or `PruneSettings` by name.

    Raises:
        AdaptPrunerError: one of its kinds, see `run_accel`.
    """
    of_request = {f.name for f in fields(AccelRequest)} & options.keys()
    of_training = RecoverySettings.model_fields.keys() & options.keys()
    others = options.keys() - of_request - of_training
    chosen = {**default_calibration(model), **{name: options[name] for name in others}}
    request = AccelRequest(
        model=model,
        data=data,
        tokens=tokens,
        sparsity=sparsity,
        params=params,
        settings=make_settings(preset, **chosen),
        recovery=make_recovery_settings(**{name: options[name] for name in of_training}),
        **{name: options[name] for name in of_request},
    )
    return run_accel(request, output, listener)


def run_accel(
    request: AccelRequest, output: str | Path, listener: AccelListener | None = None
) -> AccelOutcome:
    """Prune and train `request.model` in turns and write the result to `output`.

    A run that was killed goes on from its last checkpoint when the same request is made again, and
    ends with the same weights.

    Raises:
        AdaptPrunerError: one of its kinds; what is on disk stays, and can be resumed.
    """
    check_together(request)
    place = RunDirectory(Path(output), request.recipe(), request.overwrite)
    listener, began = listener or AccelListener(), time.perf_counter()
    with ExitStack() as stack:
        accelerator = make_accelerator(request, place.directory, stack)
        place.check(request.sources())
        is_finished = place.is_finished
        accelerator.wait_for_everyone()  # all have looked before the first one changes something
        if is_finished:
            if accelerator.is_main_process:
                with claimed(place.final):
                    place.settle()
            return AccelOutcome(None, f"'{output}' holds this run already, finished.")
        materials = gather(request, accelerator, listener)
        if accelerator.is_main_process:
            place.begin(stack)
        accelerator.wait_for_everyone()
        start_trackers(accelerator, request, stack)
        if request.recovery.alpha:
            materials.teacher = make_teacher(request, materials, place.directory, listener)
        run = Run(request, place, materials, listener, began)
        try:
            while phase := run.next_phase():
                if reason := run.reason_to_stop():
                    return AccelOutcome(None, reason)
                run.cut(phase)
                run.train(phase)
                run.close(phase)
            result = run.result()
            if accelerator.is_main_process:
                write_result(result, request, place, materials.stored_dtype)
            accelerator.wait_for_everyone()
            return AccelOutcome(result)
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted at step {run.progress.step}. {place.kept()}.") from None


@dataclass
class _Clock:
    """Seconds of each part of the present phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    since: float = 0.0

    def start(self) -> None:
        self.seconds, self.since = {}, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self.since, 3)
        self.since = now


class Run:
    """A run in progress: what it has reached, and the parts of a phase."""

    def __init__(
        self,
        request: AccelRequest,
        place: RunDirectory,
        materials: Materials,
        listener: AccelListener,
        called: float | None = None,
    ):
        """`called`: reading of the clock when the run was asked for; default: now."""
        self.request, self.place, self.materials = request, place, materials
        self.listener, self.recovery = listener, request.recovery
        self.accelerator, self.phases = materials.accelerator, materials.phases
        self.model, self.sampler = materials.model, materials.sampler()
        self.dynamic = materials.data.mixture.policy == "dynamic"
        self.batch_tokens = tokens_per_step(self.recovery)
        self.total_tokens = self.phases[-1].end_step * self.batch_tokens
        self.rate_at = learning_rates(self.recovery, self.phases[-1].end_step)
        self.moments: Moments = {}
        self.history = History(find_anatomy(self.model))
        self.began, self.clock = time.perf_counter(), _Clock()
        self.called = self.began if called is None else called
        found = place.resume(write=self.accelerator.is_main_process)
        self.progress = found[0] if found else self._first_progress()
        if found:
            self._load(found[1])
        materials.model = None  # the source is not needed any more

    def _first_progress(self) -> Progress:
        anatomy = find_anatomy(self.model)
        first = {
            "size": asdict(Size.of(anatomy)),
            "widths": anatomy.widths,
            "measurements": self._measure() or {},
            "previous": previous_record(self.model),
        }
        return Progress(
            history=self.history.state_dict(),
            first=first,
            reference_losses=reference_losses(self.materials) if self.dynamic else {},
        )

    def _load(self, checkpoint: Path) -> None:
        self.history = History.from_state(self.progress.history)
        self.model = rebuild_model(checkpoint, self.model)
        inside_phase = self.progress.step < self.phases[self.progress.phase - 1].end_step
        if self.recovery.lora_rank and inside_phase:
            self.model = add_lora(self.model, self.recovery)
        self.moments = self.place.read_tensors(checkpoint, self.model)
        assert self.progress.sampler is not None
        self.sampler.load_state_dict(self.progress.sampler)
        restore_random_states(checkpoint)

    def next_phase(self) -> Phase | None:
        """The first phase that is not closed."""
        done = len(self.progress.phases)
        return self.phases[done] if done < len(self.phases) else None

    # The parts of a phase.

    def cut(self, phase: Phase) -> None:
        """Prune to the size of the phase, moments too. Nothing to do in one that is resumed."""
        self.clock.start()
        self.listener.on_phase(phase, self.phases)
        if self.progress.phase == phase.number:
            return
        request, progress, calibration = self.request, self.progress, self.materials.calibration
        torch.manual_seed(self.materials.seed * 1_000_003 + phase.number)
        with set_aside(self.materials.teacher):
            result = prune(
                self.model,
                self.materials.tokenizer,
                params=min(phase.parameters, find_anatomy(self.model).total_parameters),
                calibration=calibration.reseeded(request.settings.seed + 7919 * phase.number),
                settings=_settings_of_phase(request.settings, len(self.phases)),
                listener=Following(self.listener.pruning, self._follow),
            )
        progress.history = self.history.state_dict()
        done = len(progress.pruning_steps)
        for record in result.steps:
            progress.pruning_steps.append({**asdict(record), "step": done + record.step})
        progress.phase = phase.number
        if self.recovery.lora_rank:
            self.model = add_lora(self.model, self.recovery)
        self.clock.lap("prune")

    def _follow(self, edit: Edit, before: Anatomy) -> None:
        edit.follow(self.model, self.moments)
        self.history.add(edit, before)

    def train(self, phase: Phase) -> None:
        """Take the optimizer steps of the phase that are left, until the time is over.

        No checkpoint after the last one: `close` writes it when the phase is whole.
        """
        guard, throughput = SpikeGuard(self.recovery.max_loss_spike), Throughput()
        with training(
            self.accelerator, self.model, self.moments, self.recovery, len(self.sampler.weights),
            self.request.settings.gradient_checkpointing,
        ) as work:  # fmt: skip
            while self.progress.step < phase.end_step:
                rate = self.rate_at(self.progress.step)
                found = self._step(work, phase, guard, rate)
                self._log(phase, found, rate, throughput.read(self.batch_tokens))
                out_of_time = self._is_out_of_time()
                due = out_of_time or self.progress.step % self.request.save_steps == 0
                if due and self.progress.step < phase.end_step:
                    self._save(*work.state())
                    throughput.read(0)
                if out_of_time:
                    break
        self.model, self.moments = work.model, work.moments
        self.clock.lap("train")

    def close(self, phase: Phase) -> None:
        """Merge, measure, and write the state from which the next phase begins."""
        if self.progress.step < phase.end_step:
            return
        if self.recovery.lora_rank:
            self.model = merge_lora(self.model)
        anatomy, evaluation = find_anatomy(self.model), self._measure()
        self.clock.lap("evaluate")
        record = {
            "phase": phase.number,
            "tokens_before": phase.first_step * self.batch_tokens,
            "tokens": phase.steps * self.batch_tokens,
            "parameters": anatomy.total_parameters,
            "widths": anatomy.widths,
            "evaluation": evaluation,
            "seconds": self.clock.seconds,
        }
        self.progress.phases.append(record)
        self._save({name: p.detach() for name, p in self.model.named_parameters()}, self.moments)
        self.accelerator.log(
            {"parameters": anatomy.total_parameters, **(evaluation or {})}, step=self.progress.step
        )
        if self.accelerator.is_main_process:
            draw_progress(self.place)
        self.listener.on_phase_end(record)

    # The parts of a step.

    def _step(
        self, work: PhaseTraining, phase: Phase, guard: SpikeGuard, rate: float
    ) -> StepResult:
        progress, first = self.progress, self.sampler.num_windows
        count = self.batch_tokens // self.recovery.sequence_length
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        batch = self.sampler.gather(self.sampler.next_indices(count)[mine])
        positions_B = torch.arange(first, first + count)[mine]
        try:
            found = work.step(batch, rate, self.materials.teacher, positions_B)
            guard.check(found.loss)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} at step {progress.step + 1} (phase {phase.number}). {self.place.kept()}."
                f" Lower --learning-rate ({self.recovery.learning_rate:g}) or clean the data, and "
                "begin anew with --overwrite; or go on with a higher --max-loss-spike, if it was a "
                "harmless one."
            ) from error
        progress.step += 1
        progress.tokens += self.batch_tokens
        if self.dynamic:
            self._reweight(found)
        progress.sampler = self.sampler.state_dict()
        return found

    def _reweight(self, found: StepResult) -> None:
        """Dynamic batch loading: domains that are further above their reference get more."""
        interval, references = self.progress.interval, self.progress.reference_losses
        names = list(self.sampler.weights)
        for i, (loss, count) in found.domain_losses.items():
            before = interval.get(names[i], [0.0, 0])
            interval[names[i]] = [before[0] + loss, before[1] + count]
        if self.progress.step % self.recovery.reweight_every == 0:
            losses = {**references, **{name: a / b for name, (a, b) in interval.items()}}
            self.sampler.weights = updated_weights(self.sampler.weights, losses, references)
            interval.clear()

    def _log(self, phase: Phase, found: StepResult, rate: float, speed: float) -> None:
        record = {
            "step": self.progress.step,
            "phase": phase.number,
            "tokens": self.progress.tokens,
            "loss": found.loss,
            "learning_rate": rate,
            "grad_norm": found.grad_norm,
            "tokens_per_second": round(speed, 1),
        }
        if self.dynamic:
            record |= {f"weight/{name}": share for name, share in self.sampler.weights.items()}
        if self.accelerator.is_main_process:
            self.place.append_log(json.dumps(record))
        self.accelerator.log(record, step=self.progress.step)
        self.listener.on_step(record, self.total_tokens)

    def _save(self, weights: dict[str, Tensor], moments: Moments) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.began
        self.began = now
        if self.accelerator.is_main_process:
            self.place.save(self.progress, self.model, weights, moments, self.materials.tokenizer)
        self.accelerator.wait_for_everyone()

    def _measure(self) -> dict[str, float] | None:
        return measure(self.model, self.materials.tokenizer, self.materials.texts) or None

    # The end.

    def _is_out_of_time(self) -> bool:
        """Whether this call has had its hours; the first process decides for all."""
        if self.request.max_hours is None:
            return False
        over = time.perf_counter() - self.called > self.request.max_hours * 3600
        return bool(broadcast_object_list([over])[0])

    def reason_to_stop(self) -> str:
        """Why no phase is begun or gone on with, although one is left; or an empty string."""
        request, done = self.request, len(self.progress.phases)
        if self._is_out_of_time():
            return (
                f"{request.max_hours:g} hours are over, at step {self.progress.step:,} of "
                f"{self.phases[-1].end_step:,}. Run the same command again to go on."
            )
        if request.stop_after is not None and done >= request.stop_after:
            return (
                f"Stopped after phase {done} of {len(self.phases)}. The same command without "
                "--stop-after goes on."
            )
        if request.max_loss is not None and done:
            record = self.progress.phases[-1]
            loss = math.log(record["evaluation"]["perplexity"])
            if loss > request.max_loss:
                return (
                    f"After phase {done}, with {record['parameters']:,} parameters, the "
                    f"evaluation loss is {loss:.3f}, above {request.max_loss:g}. The model is in "
                    f"'{self.place.directory}/checkpoints'; without --max-loss the run goes on."
                )
        return ""

    def result(self) -> PruningResult:
        """The account of the whole run."""
        anatomy, progress, first = find_anatomy(self.model), self.progress, self.progress.first
        measured = progress.phases[-1]["evaluation"] or {}
        return PruningResult(
            model=self.model,
            tokenizer=self.materials.tokenizer,
            settings=self.request.settings,
            target=self.materials.target,
            before=Size(**first["size"]),
            after=Size.of(anatomy),
            widths_before=first["widths"],
            widths_after=self.history.aligned(anatomy.widths),
            layers=self.history.layers,
            edits=self.history.edits,
            steps=[StepRecord(**record) for record in progress.pruning_steps],
            seconds=progress.seconds,
            measurements={
                name: {"before": before, "after": measured[name]}
                for name, before in first["measurements"].items()
            },
            protocol=protocol(self.request.evaluate) if self.request.evaluate else {},
            previous=first["previous"],
            training={
                "tokens": progress.tokens,
                "steps": progress.step,
                "processes": self.accelerator.num_processes,
                "settings": self.recovery.model_dump(mode="json"),
                "data": self.request.data,
                "windows_of_domain": self.sampler.drawn,
                "domains": {d.name: asdict(d.account) for d in self.materials.data.domains},
                "phases": progress.phases,
            },
        )


class Following(Listener):
    """Hears of a cut for a display, and takes along what depends on the model's structure."""

    def __init__(self, display: Listener, follow: Callable[[Edit, Anatomy], None]):
        self.on_start, self.on_progress = display.on_start, display.on_progress
        self.on_step, self.follow = display.on_step, follow

    def on_edit(self, edit: Edit, before: Anatomy) -> None:
        self.follow(edit, before)


def _settings_of_phase(settings: PruneSettings, num_phases: int) -> PruneSettings:
    """`steps` are those of the whole run; the adaptive rule counts them itself."""
    if getattr(settings, "allocation", "adaptive") == "adaptive":
        return settings
    steps = math.ceil(getattr(settings, "steps") / num_phases)  # noqa: B009
    return settings.model_copy(update={"steps": steps})
