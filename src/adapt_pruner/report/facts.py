"""What a page and a model card say about a run, in words and rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LoadingError
from ..export.engines import Serving, limits, servings
from ..figures import change, duration, figure, in_bytes, promise, short, steps_of
from ..parsing import ParsingError, parse_yaml
from .record import Run

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
KINDS = {"intermediate_size": "MLP neurons", "num_key_value_heads": "KV groups"}


@dataclass(frozen=True)
class Row:
    """One fact before and after."""

    name: str
    before: str
    after: str
    change: str
    note: str = ""


@dataclass(frozen=True)
class Sample:
    """What both models wrote after a prompt; `dense` is None where that model was not at hand."""

    prompt: str
    dense: str | None
    pruned: str


@dataclass
class Extras:
    """What is made when the page is made, and not stored by the run."""

    samples: list[Sample] = field(default_factory=list)
    missing_dense: str = ""
    """Why the dense model could not be asked, if it could not."""
    speed: dict[str, tuple[float, float]] = field(default_factory=dict)
    """"prefill" and "decode" -> tokens per second before and after."""
    speed_note: str = ""
    scores: list[Row] = field(default_factory=list)
    """Results of benchmarks."""


@dataclass
class Facts:
    """What there is to say of one run."""

    run: Run
    source: str
    """The dense model as a reader knows it: its name on the hub, or that of its directory."""
    sentences: list[str]
    rows: list[Row]
    parts: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    phases: list[dict[str, Any]]
    extremes: str
    """Which layer gave up the most and the least."""
    protocol: str
    """On what quality was measured, and how."""
    loading: str
    """Python that loads the model."""
    loading_notes: list[str]
    """What else there is to say of loading it."""
    servings: list[Serving]
    """How each engine serves it."""
    limits: list[str]
    """What other tools may stumble over."""


def facts_of(run: Run, extras: Extras | None = None) -> Facts:
    """Gather them."""
    extras = extras or Extras()
    source = run.record.base_model or Path(dense_model(run) or "a model in memory").name
    return Facts(
        run=run,
        source=source,
        sentences=_sentences(run, source),
        rows=[
            *_size_rows(run),
            *_quality_rows(run),
            *extras.scores,
            *_speed_rows(run, extras.speed),
        ],
        parts=_parts(run),
        layers=_layers(run),
        phases=_phases(run),
        extremes=_extremes(run),
        protocol=_protocol(run),
        loading=_loading(run),
        loading_notes=_loading_notes(run),
        servings=servings(run.name, run.config),
        limits=limits(run.config),
    )


def dense_model(run: Run) -> str | None:
    """Name or directory of the model that was pruned, as it was given."""
    try:
        recipe = parse_yaml(run.recipe)
    except ParsingError as error:
        raise LoadingError(f"'{run.directory / 'recipe.yaml'}' is {error}; restore it.") from error
    named = recipe.get("model") if isinstance(recipe, dict) else None
    return (named if isinstance(named, str) else None) or run.record.source_model


def _sentences(run: Run, source: str) -> list[str]:
    record = run.record
    before, after = record.before, record.after
    if not record.steps:
        return [f"{source} already had the size asked for; nothing was cut."]
    tokens = run.training[-1].tokens if run.training else record.training and record.training.tokens
    trained = f"{short(tokens)} tokens of" if tokens else "no"
    steps = steps_of(len(record.steps))
    first = (
        f"{source} was cut from {before.total:,} to {after.total:,} parameters: "
        f"{record.sparsity:.1%} of its decoder layers went, in {steps} and "
        f"{duration(record.seconds)}, with {trained} recovery training."
    )
    if record.target and record.target.timing:
        first += f" It is {promise(record.target.timing.model_dump())}."
    pair = record.measurements.get("perplexity")
    if pair is None:
        return [first, "Its quality was not measured in this run."]
    verb = "rose" if pair["after"] > pair["before"] else "fell"
    text = Path(record.protocol.text).name if record.protocol else "the held-out text"
    return [
        first,
        f"Perplexity on {text} {verb} from {figure(pair['before'])} to {figure(pair['after'])}.",
    ]


def _size_rows(run: Run) -> list[Row]:
    before, after = run.record.before, run.record.after

    def row(name: str, old: float, new: float, form=lambda value: f"{value:,}", note="") -> Row:
        return Row(name, form(old), form(new), change(old, new), note)

    rows = [
        row("parameters", before.total, after.total),
        row("in decoder layers", before.decoder_layers, after.decoder_layers),
        row("embeddings and others", before.other, after.other),
    ]
    dtype = str(run.config.get("dtype") or run.config.get("torch_dtype"))
    if size := BYTES.get(dtype):
        rows.append(
            row("weights", before.total * size, after.total * size, in_bytes, f"in {dtype}")
        )
        old, new = (_kv_entries(run, widths) * size for widths in _both(run))
        if old:
            rows.append(row("KV cache per token", old, new, in_bytes, f"in {dtype}"))
    return rows


def _both(run: Run) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    return run.record.widths_before, run.record.widths_after


def _kv_entries(run: Run, widths: list[dict[str, int]]) -> int:
    """Key and value entries per token over all layers."""
    heads = run.record.widths_before[0].get("num_attention_heads")
    size = run.config.get("head_dim")
    if not size and heads:
        size = run.config.get("hidden_size", 0) // heads
    return 2 * (size or 0) * sum(layer.get("num_key_value_heads", 0) for layer in widths)


def _quality_rows(run: Run) -> list[Row]:
    return [
        Row(
            name,
            figure(pair["before"]),
            figure(pair["after"]),
            change(pair["before"], pair["after"]),
        )
        for name, pair in run.record.measurements.items()
    ]


def _speed_rows(run: Run, speed: dict[str, tuple[float, float]]) -> list[Row]:
    ideal = run.record.before.total / run.record.after.total
    return [
        Row(
            f"{name} tokens/s",
            f"{old:,.0f}",
            f"{new:,.0f}",
            f"{new / old:.2f}×",
            f"ideal {ideal:.2f}×",
        )
        for name, (old, new) in speed.items()
    ]


def _protocol(run: Run) -> str:
    told = run.record.protocol
    if not run.record.measurements or not told:
        return ""
    most = f", at most {told.max_windows} of them" if told.max_windows else ""
    return (
        f"Perplexity per token on {Path(told.text).name}: windows of {told.window} tokens, stride "
        f"{told.stride}{most}."
    )


def _layers(run: Run) -> list[dict[str, Any]]:
    cut = run.record.parameters_cut
    return [
        {
            "layer": i,
            **{name: (old.get(name), new.get(name, 0 if name in old else None)) for name in KINDS},
            "heads": (
                old.get("num_attention_heads"),
                new.get("num_attention_heads", 0 if "num_attention_heads" in old else None),
            ),
            "cut": cut[i] if cut else 0,
        }
        for i, (old, new) in enumerate(zip(*_both(run), strict=True))
    ]


PARTS = {"MLP": "intermediate_size", "attention": "num_key_value_heads"}
"""Part of a model -> the width that says how many units it has."""


def _parts(run: Run) -> list[dict[str, Any]]:
    """Units and parameters of each part."""
    before, after = run.record.before, run.record.after
    all_cut = before.total - after.total
    parts: list[dict[str, Any]] = []
    for part, width in PARTS.items():
        if part in before.parts:
            units = [sum(widths.get(width, 0) for widths in of_layers) for of_layers in _both(run)]
            parts.append(
                {
                    "label": KINDS[width] if all(units) else part,
                    "units": units if all(units) else None,
                    "parameters": [before.parts[part], after.parts.get(part, 0)],
                }
            )
    if not parts:
        return []
    other = [
        total - sum(part["parameters"][i] for part in parts)
        for i, total in enumerate((before.total, after.total))
    ]
    parts.append({"label": "embeddings, norms and others", "units": None, "parameters": other})
    for part in parts:
        old, new = part["parameters"]
        part["share_of_cut"] = f"{(old - new) / all_cut if all_cut else 0:.1%}"
    return parts


ABOUT_THE_SAME = 1.1
"""Times what the layer that gave up the least did, up to which layers are not told apart."""


def _extremes(run: Run) -> str:
    """Which layer gave up the most and the least, in words."""
    cuts = run.record.parameters_cut
    if not any(cuts) or len(cuts) < 2:
        return ""
    if len(set(cuts)) == 1:
        return f"All {len(cuts)} layers gave up the same."
    total = sum(cuts)
    most, least = cuts.index(max(cuts)), cuts.index(min(cuts))
    if max(cuts) <= ABOUT_THE_SAME * min(cuts):
        return (
            f"All {len(cuts)} layers gave up about the same, {1 / len(cuts):.0%} of all that was "
            "cut each."
        )
    shares = [cuts[layer] / total for layer in (most, least)]
    forms = (form for form in (".0%", ".1%", ".2%") if len({f"{s:{form}}" for s in shares}) > 1)
    form = next(forms, ".3%")
    return (
        f"Layer {most} gave up the most, {shares[0]:{form}} of all that was cut; layer {least} the "
        f"least, {shares[1]:{form}}."
    )


def _phases(run: Run) -> list[dict[str, Any]]:
    """Per phase: where it begins, its size, its tokens, its loss at start and end."""
    rows = []
    ends = [*(phase.tokens_before for phase in run.phases[1:]), float("inf")]
    for phase, end in zip(run.phases, ends, strict=False):
        inside = [step for step in run.training if phase.tokens_before < step.tokens <= end]
        rows.append(
            {
                "phase": phase.phase,
                "parameters": phase.parameters,
                "start": phase.tokens_before,
                "first": inside[0].loss if inside else None,
                "last": inside[-1].loss if inside else None,
                "perplexity": (phase.evaluation or {}).get("perplexity"),
            }
        )
    return rows


def _loading(run: Run) -> str:
    need = "import adapt_pruner  # layers differ in width\n" if run.is_heterogeneous else ""
    return (
        f"{need}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({run.name!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({run.name!r})"
    )


def _loading_notes(run: Run) -> list[str]:
    """Sentences without anything that a user or a model is called: they go into Markdown as is."""
    if not run.is_heterogeneous:
        return []
    notes = [
        "Programs that build a model by the name of its class (`transformers serve`, trl's "
        "`SFTTrainer` with a path, quanto when it loads again) need the import as well: put "
        "`adapt-pruner with` before their command, such as "
        "`adapt-pruner with trl sft --model_name_or_path ...`."
    ]
    if run.is_portable:
        return [
            "Without adapt-pruner, from transformers 4.57 on: pass `trust_remote_code=True` to "
            "`AutoModelForCausalLM.from_pretrained`, `AutoModel` or a classifier's class; the code "
            "is `modeling_pruned.py` beside the weights.",
            *notes,
        ]
    return [*notes, "`--portable` adds the code that readers without adapt-pruner need."]
