"""A run in progress: the phases of Adapt-Accel, each a cut, training, and a checkpoint."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..allocate.masks import Masks
from ..api import previous_record
from ..data.sampling import updated_weights
from ..errors import NonFiniteError
from ..methods import method_named
from ..model.anatomy import find_anatomy
from ..model.history import History
from ..processes import decided_by_first
from ..result import Size
from ..run import measure, store_as
from .cutting import prune_to
from .finish import draw_progress
from .launch import processes_of
from .lora import add_lora, merge_lora
from .materials import Materials, reference_losses
from .moments import Moments
from .randomness import gather_random_states, restore_random_states, seed_process
from .request import AccelListener, AccelRequest
from .schedule import Phase, learning_rates, tokens_per_step
from .state import Progress, RunDirectory, rebuild_model
from .training import PhaseTraining, SpikeGuard, StepResult, Throughput, training


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
    """What a run has reached, and the parts of a phase."""

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
        self.processes = processes_of(self.accelerator)
        self.sampler = materials.sampler()
        self.dynamic = materials.data.mixture.policy == "dynamic"
        self.batch_tokens = tokens_per_step(self.recovery)
        self.total_tokens = self.phases[-1].end_step * self.batch_tokens
        self.rate_at = learning_rates(self.recovery, self.phases[-1].end_step)
        self.moments: Moments = {}
        self.masks: Masks | None = None
        """In a phase that trains them."""
        self.began, self.clock = time.perf_counter(), _Clock()
        self.called = self.began if called is None else called
        found = place.resume(write=self.accelerator.is_main_process)
        if found:
            materials.model = None  # only the checkpoint is needed
            self.progress = found[0]
            self._load(found[1])
        else:
            self.model = materials.source()
            self.history = History(find_anatomy(self.model))
            self.progress = self._first_progress()
            materials.model = None

    def _first_progress(self) -> Progress:
        anatomy = find_anatomy(self.model)
        first = {
            "size": asdict(Size.of(anatomy)),
            "widths": anatomy.widths,
            "measurements": self._measure() or {},
            "previous": previous_record(self.model),
        }
        references = reference_losses(self.materials) if self.dynamic else {}
        return Progress(
            history=self.history.state_dict(),
            first=first,
            reference_losses=decided_by_first(references, self.processes),
        )

    def _load(self, checkpoint: Path) -> None:
        self.history = History.from_state(self.progress.history)
        device, empty = self.accelerator.device, self.materials.empty
        self.model = rebuild_model(checkpoint, empty, self.materials.dtype, device)
        inside_phase = self.progress.step < self.phases[self.progress.phase - 1].end_step
        if self.recovery.lora_rank and inside_phase:
            self.model = add_lora(self.model, self.recovery)
        if inside_phase and self.phases[self.progress.phase - 1].trains_masks:
            self._add_masks()
        self.place.read_weights(checkpoint, self.model)
        if not self._is_sharded or self.accelerator.is_main_process:
            self.moments = self.place.read_moments(
                checkpoint, torch.device("cpu") if self._is_sharded else device
            )
        assert self.progress.sampler is not None
        self.sampler.load_state_dict(self.progress.sampler)
        restore_random_states(self.place.read_random_states(checkpoint), self.processes)

    @property
    def _is_sharded(self) -> bool:
        return self.recovery.sharding == "fsdp2" and self.accelerator.num_processes > 1

    def next_phase(self) -> Phase | None:
        """The first phase that is not closed."""
        done = len(self.progress.phases)
        return self.phases[done] if done < len(self.phases) else None

    # The parts of a phase.

    def cut(self, phase: Phase) -> None:
        """Prune to the size of the phase, moments too, or put masks on, after whose training the
        cut comes. Nothing to do in a phase that is resumed."""
        self.clock.start()
        self.listener.on_phase(phase, self.phases)
        if self.progress.phase == phase.number:
            return
        seed = self.materials.seed * 1_000_003 + phase.number
        torch.manual_seed(seed)
        if phase.trains_masks:
            self._add_masks()
        else:
            prune_to(phase, self)
        self.progress.phase = phase.number
        if self.recovery.lora_rank:
            self.model = add_lora(self.model, self.recovery)
        seed_process(seed, self.processes)
        self.clock.lap("prune")

    def _add_masks(self) -> None:
        anatomy = find_anatomy(self.model, self.materials.resource)
        training = method_named(self.request.settings.method).masks
        assert training is not None
        self.masks = training.make(anatomy, self.request.settings, self.materials.target)
        self.masks.attach(anatomy)

    def _cut_by_masks(self, phase: Phase) -> None:
        assert self.masks is not None
        self.masks.detach(self.model)
        self.masks.check(phase.steps)
        self.moments = {k: v for k, v in self.moments.items() if not k.startswith("masks.")}
        prune_to(phase, self)
        self.masks = None

    def train(self, phase: Phase) -> None:
        """Take the optimizer steps of the phase that are left, until the time is over.

        No checkpoint after the last one: `close` writes it when the phase is whole.
        """
        guard, throughput = SpikeGuard(self.recovery.max_loss_spike), Throughput()
        with training(
            self.accelerator, self.model, self.moments, self.recovery, len(self.sampler.weights),
            self.request.settings.gradient_checkpointing, masks=self.masks,
        ) as work:  # fmt: skip
            while self.progress.step < phase.end_step:
                rate = self.rate_at(self.progress.step)
                found = self._step(work, phase, guard, rate)
                self._log(phase, found, rate, throughput.read(self.batch_tokens))
                out_of_time = self.is_out_of_time()
                due = out_of_time or self.progress.step % self.request.save_steps == 0
                if due and self.progress.step < phase.end_step:
                    self._save(*work.state())
                    throughput.read(0)
                if out_of_time:
                    break
        self.model, self.moments = work.model, work.moments
        if self._is_sharded:
            del work
            gc.collect()  # hooks and shards refer to each other
        self.clock.lap("train")

    def close(self, phase: Phase) -> None:
        """Merge, measure, and write the state from which the next phase begins."""
        if self.progress.step < phase.end_step:
            return
        if self.recovery.lora_rank:
            self.model = merge_lora(self.model)
        if phase.trains_masks:
            self._cut_by_masks(phase)
        anatomy, evaluation = find_anatomy(self.model), self._measure()
        self.clock.lap("evaluate")
        record = {
            "phase": phase.number,
            "tokens_before": phase.first_step * self.batch_tokens,
            "tokens": phase.steps * self.batch_tokens,
            "parameters": anatomy.total_parameters,
            "widths": self.history.aligned(anatomy.widths),
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

    def convert_to_stored(self) -> dict[str, float]:
        """Convert the final model to the precision in which it is written. Returns its figures."""
        stored = self.materials.stored_dtype
        if self.request.settings.dtype == "auto" and stored not in (None, self.model.dtype):
            store_as(self.model, stored)
            return self._measure() or {}
        return self.progress.phases[-1]["evaluation"] or {}

    # The parts of a step.

    def _step(
        self, work: PhaseTraining, phase: Phase, guard: SpikeGuard, rate: float
    ) -> StepResult:
        progress, first = self.progress, self.sampler.num_windows
        count = self.batch_tokens // self.recovery.sequence_length
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        batch = self.sampler.gather(self.sampler.next_indices(count)[mine])
        positions_B = torch.arange(first, first + count)[mine]
        if self.masks is not None:
            self.masks.share = (progress.step - phase.first_step) / phase.steps
        try:
            found = work.step(batch, rate, self.materials.teacher, positions_B)
            if self.masks is None:  # which make the loss rise
                guard.check(found.loss)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} at step {progress.step + 1} (phase {phase.number}). {self.place.kept()}."
                f" Lower --learning-rate ({self.recovery.learning_rate:g}) or clean the data, and "
                "start again with --overwrite. If the spike was harmless, resume with a higher "
                "--max-loss-spike."
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
        if self.masks is not None:
            record |= {f"masked/{kind}": share for kind, share in self.masks.masked().items()}
        if self.accelerator.is_main_process:
            self.place.append_log(json.dumps(record))
        self.accelerator.log(record, step=self.progress.step)
        self.listener.on_step(record, self.total_tokens)

    def _save(self, weights: dict[str, Tensor], moments: Moments) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self.began
        self.began = now
        states = gather_random_states(self.processes)
        if self.accelerator.is_main_process:
            self.place.save(
                self.progress, self.model, weights, moments, self.materials.tokenizer, states
            )
        self.accelerator.wait_for_everyone()

    def _measure(self) -> dict[str, float] | None:
        """Figures of the first process: rounding must not let one stop while others go on."""
        found = measure(self.model, self.materials.tokenizer, self.materials.texts) or None
        return decided_by_first(found, self.processes)

    def is_out_of_time(self) -> bool:
        """Whether this call has had its hours; the first process decides for all."""
        if self.request.max_hours is None:
            return False
        over = time.perf_counter() - self.called > self.request.max_hours * 3600
        return decided_by_first(over, self.processes)
