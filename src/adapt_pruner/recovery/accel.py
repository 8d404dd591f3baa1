"""Adapt-Accel (arXiv:2502.03460, section 3.2): prune a little, train, and again, to the target."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..allocation import check_reachable, resolve_target
from ..anatomy import find_anatomy
from ..api import Listener, PruningResult, Size, StepRecord, previous_record, prune
from ..data import CalibrationData, load_calibration
from ..data.mixture import read_mixture
from ..data.packing import PackedData, prepare
from ..data.sampling import WindowSampler, updated_weights
from ..errors import InvalidSettings, NonFiniteError
from ..loading import load_model, load_tokenizer
from ..methods.adapt_pruner import limits_of
from ..run import evaluation_texts, measure, protocol, stored_dtype
from ..settings import PruneSettings
from .lora import add_lora, merge_lora
from .moments import Moments, moment_cutter
from .schedule import Phase, learning_rates, make_phases, tokens_per_step
from .settings import RecoverySettings
from .state import (
    Progress,
    RunDirectory,
    read_checkpoint_moments,
    read_weights,
    rebuild_model,
    restore_random_states,
)
from .teacher import OnlineTeacher, StoredTeacher, check_vocabularies, store_logits
from .training import PhaseTraining, SpikeGuard, StepResult, Teacher, Throughput, training

REFERENCE_WINDOWS = 64


@dataclass(frozen=True)
class AccelRequest:
    """What the user asks for: the run itself, and below how far to go and what to leave."""

    model: str
    data: str
    tokens: int
    settings: PruneSettings
    recovery: RecoverySettings
    sparsity: float | None = None
    params: int | None = None
    teacher: str | None = None
    evaluate: str | None = None
    portable: bool = False
    trust_remote_code: bool = False

    overwrite: bool = False
    stop_after: int | None = None
    """Phases after which to stop; the same request without it goes on."""
    max_hours: float | None = None
    max_loss: float | None = None
    """Stop when the loss on the evaluation text is above it at the end of a phase, in nats."""
    save_steps: int = 500
    keep_checkpoint: bool = False
    report_to: tuple[str, ...] = ()
    data_cache: Path | None = None

    def recipe(self) -> dict[str, Any]:
        """All that determines the result, so that the run can be repeated."""
        own = {name: getattr(self, name) for name in _RECIPE_NAMES}
        said = {name: value for name, value in own.items() if value not in (None, False)}
        return {
            **said,
            **self.settings.model_dump(mode="json"),
            **self.recovery.model_dump(mode="json"),
        }


_RECIPE_NAMES = (
    "model", "data", "tokens", "sparsity", "params", "teacher", "evaluate", "portable",
    "trust_remote_code",
)  # fmt: skip


@dataclass
class AccelOutcome:
    """How a run ended."""

    result: PruningResult | None
    """None if it stopped early; its state is on disk."""
    stopped: str = ""
    """Why, as a sentence."""


class AccelListener:
    """What happens during a run, for progress displays. All methods do nothing by default."""

    pruning: Listener = Listener()

    def on_prepare(self, what: str) -> None: ...
    def on_phase(self, phase: Phase, phases: tuple[Phase, ...]) -> None: ...
    def on_step(self, record: dict[str, Any], total_tokens: int) -> None: ...
    def on_phase_end(self, record: dict[str, Any]) -> None: ...


def run_accel(
    request: AccelRequest, output: Path, listener: AccelListener | None = None
) -> AccelOutcome:
    """Prune and train `request.model` in turns and write the result to `output`.

    A run that was killed goes on from its last checkpoint when the same request is made again, and
    ends with the same weights.

    Raises:
        AdaptPrunerError: one of its kinds; what is on disk stays, and can be resumed.
    """
    from .finish import finish

    place = RunDirectory(Path(output).expanduser())
    if place.is_finished and not request.overwrite:
        place.open(request.recipe(), overwrite=False)
        return AccelOutcome(None, f"'{output}' holds this run already, finished.")
    with ExitStack() as stack:
        run = _Run(request, place, listener or AccelListener(), stack)
        for phase in run.phases[max(run.progress.phase - 1, 0) :]:
            if run.progress.step >= phase.end_step:
                continue
            run.cut(phase)
            run.train(phase)
            run.close(phase)
            if reason := run.reason_to_stop(phase):
                return AccelOutcome(None, reason)
        return AccelOutcome(finish(run))


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


class _Run:
    """A run in progress: what it works on, and the parts of a phase."""

    def __init__(
        self, request: AccelRequest, place: RunDirectory, listener: AccelListener, stack: ExitStack
    ):
        from .launch import make_accelerator

        self.request, self.place, self.listener = request, place, listener
        self.settings, self.recovery = request.settings, request.recovery
        _check_together(request)
        self.accelerator = make_accelerator(request, place.directory, stack)
        self.is_main = self.accelerator.is_main_process
        self.began, self.clock = time.perf_counter(), _Clock()

        listener.on_prepare("reading the model")
        self.tokenizer = load_tokenizer(request.model, request.trust_remote_code)
        source = self._load(request.model)
        self.model: Any = source
        self.moments: Moments = {}
        anatomy = find_anatomy(source)
        self.target = resolve_target(anatomy, request.sparsity, request.params)
        check_reachable(anatomy, self.target, limits_of(self.settings, anatomy))
        self.phases = make_phases(
            self.recovery, anatomy.total_parameters, self.target, request.tokens
        )
        self.total_steps = self.phases[-1].end_step
        self.rate_at = learning_rates(self.recovery, self.total_steps)
        self.batch_windows = tokens_per_step(self.recovery) // self.recovery.sequence_length
        self._check_processes()
        with self.accelerator.main_process_first():
            if self.is_main:
                place.open(request.recipe(), request.overwrite)

        listener.on_prepare("reading the data")
        self.texts = None
        if request.evaluate:
            self.texts = evaluation_texts(
                request.evaluate, self.settings.text_column, self.settings.max_documents
            )
        self.mixture = read_mixture(request.data)
        self.data = self._prepare_data()
        self.sampler = WindowSampler(self.data, self._train_seed)
        self.calibration = self._load_calibration()

        self.progress = Progress()
        self.teacher = self._make_teacher()
        self._resume() or self._begin()

    @property
    def _train_seed(self) -> int:
        seed = self.recovery.train_seed
        return self.settings.seed if seed is None else seed

    def _load(self, name: str) -> Any:
        dtype = "float32" if self.settings.dtype == "auto" else self.settings.dtype
        model = load_model(name, dtype, "cpu", trust_remote_code=self.request.trust_remote_code)
        self.stored_dtype = stored_dtype(model)
        return model.to(self.accelerator.device)

    def _prepare_data(self) -> PackedData:
        with self.accelerator.main_process_first():
            return prepare(
                self.mixture,
                self.tokenizer,
                sequence_length=self.recovery.sequence_length,
                tokens=self.total_steps * self.batch_windows * self.recovery.sequence_length,
                cache=self.request.data_cache,
                loss_on=self.recovery.loss_on,
                repeat=self.recovery.repeat,
                exclude=self.recovery.exclude,
                seed=self._train_seed,
                vocab_size=self.model.get_input_embeddings().weight.shape[0],
            )

    def _load_calibration(self) -> CalibrationData:
        settings = self.settings
        return load_calibration(
            settings.calibration,
            self.tokenizer,
            settings.window_length,
            settings.windows,
            text_column=settings.text_column,
            max_documents=settings.max_documents,
            seed=settings.seed,
            redraw=settings.redraw,
            vocab_size=self.model.get_input_embeddings().weight.shape[0],
        )

    def _check_processes(self) -> None:
        count = self.accelerator.num_processes
        if self.batch_windows % count:
            raise InvalidSettings(
                f"batch_tokens: {self.batch_windows} windows per step cannot be shared by {count} "
                f"processes; take a multiple of {count * self.recovery.sequence_length:,} tokens."
            )

    def _make_teacher(self) -> Teacher | None:
        recovery = self.recovery
        if not recovery.alpha:
            return None
        if self.request.teacher:
            model = self._load(self.request.teacher)
            check_vocabularies(self.model, model)
        else:
            model = self._load(self.request.model)
        if recovery.teacher_top_k is None:
            return OnlineTeacher(model)
        self.listener.on_prepare("asking the teacher")
        directory = self.place.directory / "teacher"
        with self.accelerator.main_process_first():
            store_logits(
                model, WindowSampler(self.data, self._train_seed),
                self.total_steps * self.batch_windows, directory,
                recovery.teacher_top_k, recovery.temperature,
            )  # fmt: skip
        return StoredTeacher(directory)

    # -- Begin, or go on --------------------------------------------------------------------------

    def _begin(self) -> None:
        anatomy, progress = find_anatomy(self.model), self.progress
        progress.first = {
            "total": anatomy.total_parameters,
            "decoder_layers": anatomy.layer_parameters,
            "widths": anatomy.widths,
            "measurements": measure(self.model, self.tokenizer, self.texts),
            "previous": previous_record(self.model),
        }
        progress.kept = {_name(g.key): list(range(g.num_units)) for g in anatomy.groups}
        if self.mixture.policy == "dynamic":
            progress.reference_losses = {
                **self._reference_losses(), **self.mixture.reference_losses
            }  # fmt: skip

    def _resume(self) -> bool:
        found = self.place.resume()
        if found is None:
            return False
        self.progress, checkpoint = found
        phase = self.phases[self.progress.phase - 1]
        self.model = rebuild_model(checkpoint, self.model)
        if self.recovery.lora_rank and self.progress.step < phase.end_step:
            self.model = add_lora(self.model, self.recovery)
        read_weights(checkpoint, self.model)
        self.moments = read_checkpoint_moments(checkpoint)
        if self.progress.sampler is not None:
            self.sampler.load_state_dict(self.progress.sampler)
        restore_random_states(checkpoint)
        return True

    @torch.no_grad()
    def _reference_losses(self) -> dict[str, float]:
        """Loss of the source model on some windows of each domain, in nats per token."""
        from .objective import IGNORED, loss_sums, targets_of

        losses = {}
        for i, domain in enumerate(self.data.domains):
            count = min(REFERENCE_WINDOWS, domain.num_windows)
            total, labels = 0.0, 0
            for window in range(count):
                batch = self.sampler.gather(torch.tensor([[i, window]]).numpy())
                ids = batch.input_ids.to(self.accelerator.device)
                labels_BT = batch.labels.to(self.accelerator.device)
                logits = self.model(input_ids=ids, use_cache=False).logits
                total += float(loss_sums(logits, labels_BT)[0])
                labels += int((targets_of(labels_BT) != IGNORED).sum())
            losses[domain.name] = total / max(labels, 1)
        return losses

    # -- The parts of a phase ---------------------------------------------------------------------

    def cut(self, phase: Phase) -> None:
        """Prune to the size of the phase, moments too. Does nothing in a phase that is resumed."""
        self.clock.start()
        self.listener.on_phase(phase, self.phases)
        if self.progress.phase == phase.number:
            return
        torch.manual_seed(self._train_seed * 1_000_003 + phase.number)
        cut_moments = moment_cutter(self.model, find_anatomy(self.model))
        calibration = self.calibration
        result = prune(
            self.model,
            self.tokenizer,
            params=phase.parameters,
            calibration=CalibrationData(
                calibration.documents, calibration.window_length, calibration.num_windows,
                seed=self.settings.seed + 7919 * phase.number, redraw=calibration.redraw,
            ),
            settings=self._settings_of_phase(),
            listener=self.listener.pruning,
        )  # fmt: skip
        if self.recovery.moments == "reset":
            self.moments = {}
        else:
            cut_moments(self.moments, result.kept)
        progress = self.progress
        for key, kept in result.kept.items():
            before = progress.kept[_name(key)]
            progress.kept[_name(key)] = [before[i] for i in kept.tolist()]
        done = len(progress.pruning_steps)
        for record in result.steps:
            progress.pruning_steps.append({**asdict(record), "step": done + record.step})
        progress.phase = phase.number
        if self.recovery.lora_rank:
            self.model = add_lora(self.model, self.recovery)
        self.clock.lap("prune")

    def _settings_of_phase(self) -> PruneSettings:
        """`steps` are those of the whole run, except where the adaptive rule counts them itself."""
        if self.settings.allocation == "adaptive":
            return self.settings
        steps = math.ceil(self.settings.steps / len(self.phases))
        return self.settings.model_copy(update={"steps": steps})

    def train(self, phase: Phase) -> None:
        """Take the optimizer steps of the phase that are left."""
        guard, throughput = SpikeGuard(self.recovery.max_loss_spike), Throughput()
        with training(
            self.accelerator, self.model, self.moments, self.recovery, len(self.data.domains)
        ) as work:
            while self.progress.step < phase.end_step:
                found, rate = self._step(work, phase, guard)
                self._log(phase, found, rate, throughput)
                if self.progress.step % self.request.save_steps == 0:
                    self._save(*work.state())
                    throughput.read(0)
                    if self._out_of_time():
                        break
        self.model, self.moments = work.model, work.moments
        self.clock.lap("train")

    def _step(
        self, work: PhaseTraining, phase: Phase, guard: SpikeGuard
    ) -> tuple[StepResult, float]:
        progress, accelerator = self.progress, self.accelerator
        rate = self.rate_at(progress.step)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        first = self.sampler.num_windows
        batch = self.sampler.gather(self.sampler.next_indices(self.batch_windows)[mine])
        positions = torch.arange(first, first + self.batch_windows)[mine]
        try:
            found = work.step(
                batch.input_ids, batch.labels, batch.domains, rate, self.teacher, positions
            )
            guard.check(found.loss)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{error} at step {progress.step + 1} (phase {phase.number}). Nothing was written "
                f"since the last checkpoint in '{self.place.directory}'. Lower --learning-rate "
                f"({self.recovery.learning_rate:g}) or clean the data, and begin anew with "
                "--overwrite; for a spike that is harmless, raise --max-loss-spike."
            ) from error
        progress.step += 1
        progress.tokens += self.batch_windows * self.recovery.sequence_length
        if self.mixture.policy == "dynamic":
            self._reweight(found)
        progress.sampler = self.sampler.state_dict()
        return found, rate

    def _reweight(self, found: StepResult) -> None:
        """Dynamic batch loading: domains that are further from their reference get more."""
        interval = self.progress.interval
        for i, (loss, count) in found.domain_losses.items():
            name = self.data.domains[i].name
            before = interval.get(name, [0.0, 0])
            interval[name] = [before[0] + loss, before[1] + count]
        if self.progress.step % self.recovery.reweight_every == 0:
            references = self.progress.reference_losses
            losses = {
                name: interval[name][0] / interval[name][1]
                if name in interval
                else references[name]
                for name in self.sampler.weights
            }
            self.sampler.weights = updated_weights(self.sampler.weights, losses, references)
            interval.clear()

    def _log(self, phase: Phase, found: StepResult, rate: float, throughput: Throughput) -> None:
        record = {
            "step": self.progress.step,
            "phase": phase.number,
            "tokens": self.progress.tokens,
            "loss": found.loss,
            "learning_rate": rate,
            "grad_norm": found.grad_norm,
            "tokens_per_second": round(
                throughput.read(self.batch_windows * self.recovery.sequence_length), 1
            ),
        }
        if self.is_main:
            with self.place.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        self.accelerator.log(record, step=self.progress.step)
        total = self.total_steps * self.batch_windows * self.recovery.sequence_length
        self.listener.on_step(record, total)

    def close(self, phase: Phase) -> None:
        """Merge, measure, and write the state from which the next phase begins."""
        if self.progress.step < phase.end_step:
            return
        if self.recovery.lora_rank:
            self.model = merge_lora(self.model)
            self.moments = {}  # of the low-rank updates, which are gone
        anatomy = find_anatomy(self.model)
        evaluation = measure(self.model, self.tokenizer, self.texts) or None
        self.clock.lap("evaluate")
        record = {
            "phase": phase.number,
            "tokens_before": phase.first_step * tokens_per_step(self.recovery),
            "tokens": phase.steps * tokens_per_step(self.recovery),
            "parameters": anatomy.total_parameters,
            "widths": anatomy.widths,
            "evaluation": evaluation,
            "seconds": self.clock.seconds,
        }
        self.progress.phases.append(record)
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        self._save(weights, self.moments)
        self.listener.on_phase_end(record)

    def _save(self, weights: dict[str, Tensor], moments: Moments) -> None:
        self.progress.seconds += time.perf_counter() - self.began
        self.began = time.perf_counter()
        if self.is_main:
            self.place.save(self.progress, self.model, weights, moments, self.tokenizer)
        self.accelerator.wait_for_everyone()

    def _out_of_time(self) -> bool:
        hours = self.request.max_hours
        return hours is not None and self.progress.seconds > hours * 3600

    def reason_to_stop(self, phase: Phase) -> str:
        """Why the run ends after this phase, or an empty string."""
        request, unfinished = self.request, phase.number < len(self.phases)
        again = "Run the same command again to go on."
        if self._out_of_time() and (unfinished or self.progress.step < phase.end_step):
            return f"{request.max_hours:g} hours are over, in phase {phase.number}. {again}"
        if request.stop_after and phase.number >= request.stop_after and unfinished:
            return f"Stopped after phase {phase.number} of {len(self.phases)}. {again}"
        if request.max_loss is not None and unfinished:
            loss = math.log(self.progress.phases[-1]["evaluation"]["perplexity"])
            if loss > request.max_loss:
                return (
                    f"After phase {phase.number} the evaluation loss is {loss:.3f}, above "
                    f"{request.max_loss:g}: stopped at "
                    f"{self.progress.phases[-1]['parameters']:,} parameters. The model is in "
                    f"'{self.place.directory}/checkpoints'; without --max-loss the run goes on."
                )
        return ""

    def result(self) -> PruningResult:
        """The account of the whole run."""
        anatomy, progress, first = find_anatomy(self.model), self.progress, self.progress.first
        measured = progress.phases[-1]["evaluation"] or {}
        return PruningResult(
            model=self.model,
            tokenizer=self.tokenizer,
            settings=self.settings,
            target=self.target,
            before=Size(first["total"], first["decoder_layers"]),
            after=Size.of(anatomy),
            widths_before=first["widths"],
            widths_after=anatomy.widths,
            kept={g.key: torch.tensor(progress.kept[_name(g.key)]) for g in anatomy.groups},
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
                "settings": self.recovery.model_dump(mode="json"),
                "data": self.request.data,
                "windows_of_domain": self.sampler.drawn,
                "phases": progress.phases,
            },
        )


def _name(key: tuple[int, str]) -> str:
    return f"{key[0]}/{key[1]}"


def _check_together(request: AccelRequest) -> None:
    """Raise InvalidSettings for what cannot be asked for together."""
    recovery, settings = request.recovery, request.settings
    if settings.device_map is not None:
        raise InvalidSettings(
            "device_map: training spreads over devices by `accelerate launch` and --sharding fsdp2; "
            f"got device_map {settings.device_map}."
        )
    if request.max_loss is not None and not request.evaluate:
        raise InvalidSettings("max_loss: needs a text to measure on; give --evaluate TEXT.")
    if request.teacher and not recovery.alpha:
        raise InvalidSettings(
            f"teacher: '{request.teacher}' would not be used with alpha 0; give --alpha 0.5, say."
        )
    if recovery.lora_rank and recovery.sharding == "fsdp2":
        raise InvalidSettings("lora_rank: works with --sharding ddp; got fsdp2.")
