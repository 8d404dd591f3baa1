"""What a run says of itself: why it stops early, and the account of all of it."""

from __future__ import annotations

import math
from dataclasses import asdict

from ..model.anatomy import find_anatomy
from ..result import PruningResult, Size, StepRecord
from ..run import protocol
from .run import Run


def reason_to_stop(run: Run) -> str:
    """Why the run stops although a phase is left; an empty string if it continues."""
    request, done = run.request, len(run.progress.phases)
    if run.is_out_of_time():
        return (
            f"{request.max_hours:g} hours are over, at step {run.progress.step:,} of "
            f"{run.phases[-1].end_step:,}. Run the same command again to go on."
        )
    if request.stop_after is not None and done >= request.stop_after:
        return (
            f"Stopped after phase {done} of {len(run.phases)}. The same command without "
            "--stop-after goes on."
        )
    if request.max_loss is not None and done:
        record = run.progress.phases[-1]
        loss = math.log(record["evaluation"]["perplexity"])
        if loss > request.max_loss:
            return (
                f"After phase {done}, with {record['parameters']:,} parameters, the "
                f"evaluation loss is {loss:.3f}, above {request.max_loss:g}. The model is in "
                f"'{run.place.directory}/checkpoints'; without --max-loss the run goes on."
            )
    return ""


def account_of(run: Run, measured: dict[str, float]) -> PruningResult:
    """The account of the whole run; `measured` are the figures of the final model."""
    progress, first = run.progress, run.progress.first
    resource = run.materials.resource
    anatomy = find_anatomy(run.model, resource)
    return PruningResult(
        model=run.model,
        tokenizer=run.materials.tokenizer,
        settings=run.request.settings,
        target=run.materials.target,
        reached=anatomy.amount,
        resource=resource,
        before=Size(**first["size"]),
        after=Size.of(anatomy),
        widths_before=first["widths"],
        widths_after=run.history.aligned(anatomy.widths),
        layers=run.history.layers,
        edits=run.history.edits,
        steps=[StepRecord(**record) for record in progress.pruning_steps],
        seconds=progress.seconds,
        measurements={
            name: {"before": before, "after": measured[name]}
            for name, before in first["measurements"].items()
        },
        protocol=protocol(run.request.evaluate) if run.request.evaluate else {},
        previous=first["previous"],
        training={
            "tokens": progress.tokens,
            "steps": progress.step,
            "processes": run.accelerator.num_processes,
            "settings": run.recovery.model_dump(mode="json"),
            "data": run.request.data,
            "windows_of_domain": run.sampler.drawn,
            "domains": {d.name: asdict(d.account) for d in run.materials.data.domains},
            "phases": progress.phases,
        },
    )
