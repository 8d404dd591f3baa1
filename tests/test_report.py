"""The report: what it says, that it says it of every kind of run, and how it looks in a browser."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from adapt_pruner.report import samples
from adapt_pruner.report.page import render
from adapt_pruner.report.record import read_run
from report_runs import train

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close, and collects the visible text, the ids and every address."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.addresses: list[str] = []
        self.charts = 0
        self.feed(source)
        assert self.open == []
        self.said = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        self.refers += (values.get("aria-labelledby") or "").split()
        self.addresses += [values[key] for key in ("src", "href", "action") if key in values]
        self.charts += tag == "svg" and values.get("role") == "img"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TestFacts:
    def test_prune_writes_the_page(self, pruned):
        page, record = Page((pruned / "report.html").read_text()), read_run(pruned).record
        pair = record.measurements["perplexity"]
        assert f"from {record.before.total:,} to {record.after.total:,} parameters" in page.said
        assert f"{record.sparsity:.1%} of its decoder layers went, in 3 steps" in page.said
        assert f"from {pair['before']:.2f} to {pair['after']:.2f}" in page.said
        assert "tiny & <pruned>" in page.said  # escaped in the source
        assert page.charts == 5

    def test_page_needs_nothing_but_itself(self, pruned):
        source = (pruned / "report.html").read_text()
        page = Page(source)
        assert [a for a in page.addresses if not a.startswith(("#", "data:"))] == []
        assert not re.search(r"@import|url\(|<script", source)
        assert len(page.ids) == len(set(page.ids))
        assert set(page.refers) <= set(page.ids)

    def test_parts_add_up(self, pruned):
        from adapt_pruner.report.facts import facts_of

        facts = facts_of(run := read_run(pruned))
        for i, size in enumerate((run.record.before, run.record.after)):
            assert sum(part["parameters"][i] for part in facts.parts) == size.total
        cut = run.record.before.total - run.record.after.total
        assert sum(layer["cut"] for layer in facts.layers) == cut
        assert facts.parts[-1]["parameters"][0] == facts.parts[-1]["parameters"][1]

    def test_kv_cache_per_token(self, pruned):
        from adapt_pruner.report.facts import facts_of

        run = read_run(pruned)
        groups = sum(widths["num_key_value_heads"] for widths in run.record.widths_after)
        (row,) = [row for row in facts_of(run).rows if row.name == "KV cache per token"]
        assert row.after == f"{2 * groups * run.config['head_dim'] * 4} B"

    @pytest.mark.parametrize(
        ("cuts", "says"),
        [
            ([100] * 5, "All 5 layers gave up the same."),
            ([101, 100, 99, 100, 98], "All 5 layers gave up about the same, 20% of all that was"),
            (
                [340, *[300] * 31, 260],
                "Layer 0 gave up the most, 3.4% of .*; layer 32 the least, 2.6%",
            ),
            ([60, 30, 10], "Layer 0 gave up the most, 60% of .*; layer 2 the least, 10%"),
            ([7], ""),
            ([0, 0], ""),
        ],
    )
    def test_says_which_layer_gave_up_the_most_where_one_did(self, cuts, says):
        from adapt_pruner.report.facts import _extremes

        run = SimpleNamespace(record=SimpleNamespace(parameters_cut=cuts))
        assert re.match(says or "$", _extremes(run))

    def test_card_has_the_same_facts_and_metrics(self, pruned):
        card = (pruned / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        (result,) = front["model-index"][0]["results"]
        values = {metric["type"]: metric["value"] for metric in result["metrics"]}
        measured = read_run(pruned).record.measurements
        assert values["perplexity"] == measured["perplexity"]["after"]
        assert values["bits_per_byte"] == measured["bits per byte"]["after"]
        assert result["dataset"]["name"] == "text.txt"
        assert "window 256" in result["metrics"][0]["name"]
        assert "of its decoder layers went" in card

    def test_page_can_be_made_long_after(self, cli, pruned, run, llama):
        assert cli("report", run).status == 0
        first, again = ((d / "report.html").read_text() for d in (pruned, run))
        assert "-o &#39;tiny &amp; &lt;pruned&gt;&#39;" in first
        first, again = (page.replace("&#39;", "").replace("'", "") for page in (first, again))
        assert again == first.replace("tiny &amp; &lt;pruned&gt;", "run").replace(
            "tiny & <pruned>", "run"
        )

    def test_run_without_quality(self, run):
        edit(run / "run.json", measurements={}, protocol=None)
        assert "Its quality was not measured" in Page(render([read_run(run)])).said

    def test_groups_of_layers_that_lost_none_are_there_too(self, run):
        record = json.loads((run / "pruning.json").read_text())
        (cut,) = record["edits"]
        lost = {name: axis for name, axis in cut["axes"].items() if name.endswith("/kv-groups")}
        (first, axis), *others = sorted(lost.items())
        for name, _ in others:
            del cut["axes"][name]
        cut["axes"][first] = {**axis, "kept": axis["kept"][:1]}
        (run / "pruning.json").write_text(json.dumps(record))
        read = read_run(run)
        layer, groups = int(first.split("/")[0]), axis["units"]
        assert read.kept_groups[layer] == (groups, axis["kept"][:1])
        whole = {i: kept for i, kept in read.kept_groups.items() if i != layer}
        assert len(whole) == len(read.record.widths_before) - 1
        assert set(map(str, whole.values())) == {str((groups, list(range(groups))))}

    def test_record_of_an_earlier_version(self, run):
        record = json.loads((run / "run.json").read_text())
        for key in ("protocol", "base_model", "layers_left"):
            record.pop(key, None)
        for size in (record["before"], record["after"]):
            del size["layers"], size["parts"]
        (run / "run.json").write_text(json.dumps(record))
        groups = read_run(run).kept_groups
        pruning = json.loads((run / "pruning.json").read_text())
        (cut,) = pruning.pop("edits")
        kinds = {"kv-groups": "attention", "neurons": "mlp"}
        layers = {}
        for name, entry in cut["axes"].items():
            layer, kind = name.split("/")
            if kind in kinds:
                layers.setdefault(layer, {})[kinds[kind]] = entry
        (run / "pruning.json").write_text(json.dumps({**pruning, "format": 1, "layers": layers}))
        assert read_run(run).kept_groups == groups
        page = Page(render([read_run(run)]))
        assert page.charts == 4  # without the parameters by part

    def test_run_that_cut_nothing(self, run):
        edit(run / "run.json", steps=[])
        assert "already had the size asked for" in Page(render([read_run(run)])).said

    def test_training_log(self, run):
        train(run, [3.0, 2.5, 2.75, 2.25], [(0, 900, None), (200, 800, 7.5)])
        page = Page(render([read_run(run)]))
        assert "with 400 tokens of recovery training" in page.said
        assert "Cuts at 0, 200." in page.said
        assert "1 900 0 3.000 2.500 – 2 800 200 2.750 2.250 7.500" in page.said

    def test_training_that_was_stopped(self, run):
        train(run, [3.0, float("nan"), 2.5], [(0, 900, None)])
        with (run / "training.jsonl").open("a") as log:
            log.write('{"step": 4, "pha')
        assert [step.loss for step in read_run(run).training] == [3.0, 2.5]

    def test_several_runs_are_compared(self, pruned, run):
        page = Page(render([read_run(pruned), read_run(run)]))
        assert "2 pruned models" in page.said
        assert page.charts == 1 + 2 * 5
        assert len(page.ids) == len(set(page.ids))

    def test_runs_on_other_text_are_not_drawn_together(self, pruned, run):
        protocol = read_run(run).record.protocol
        assert protocol is not None
        edit(run / "run.json", protocol={**protocol.model_dump(), "text": "other.txt"})
        assert Page(render([read_run(pruned), read_run(run)])).charts == 2 * 5


class TestSamples:
    def test_both_models_write(self, cli, run, llama):
        done = cli(
            "report", run, "--prompt", "the of", "--max-new-tokens", 5, "--speed", "--dense", llama
        )
        assert done.status == 0, done.err
        page = Page((run / "report.html").read_text())
        assert page.said.count("the of") == 2
        assert "decode tokens/s" in page.said
        assert "Size, quality, speed" in page.said

    def test_dense_model_that_is_gone(self, cli, run):
        done = cli("report", run, "--prompt", "the of", "--max-new-tokens", 5, "--dense", "./gone")
        assert done.status == 0
        assert "There is no model directory './gone'" in done.err
        page = Page((run / "report.html").read_text())
        assert "The dense model was not asked: There is no model directory" in page.said
        assert page.said.count("the of") == 1

    @pytest.mark.parametrize("speed", [[], ["--speed"]])
    def test_only_what_the_directory_holds_is_loaded(self, cli, run, monkeypatch, speed):
        (run / "recipe.yaml").write_text("model: someone/else'; rm -rf\n")
        loaded = []
        real = samples.load_model
        monkeypatch.setattr(
            samples, "load_model", lambda name, **kw: (loaded.append(name), real(name, **kw))[1]
        )
        done = cli("report", run, "--prompt", "the of", "--max-new-tokens", 5, *speed)
        assert done.status == 0, done.err
        assert loaded == [str(run)]
        asked = shlex.quote("someone/else'; rm -rf")
        assert f"only what the run's directory holds is loaded; add --dense {asked}" in done.err


def evaluated(file, model, parameters, value):
    scores = [{"name": "PIQA", "metric": "acc_norm", "value": value, "stderr": 0.01}]
    return {"model": str(model), "parameters": parameters, "scores": scores}


class TestEvaluation:
    def test_scores_before_and_after(self, cli, run, llama, tmp_path):
        record, file = read_run(run).record, tmp_path / "scores.json"
        models = [evaluated(file, llama, record.before.total, 0.75),
                  evaluated(file, run, record.after.total, 0.5)]  # fmt: skip
        file.write_text(json.dumps({"format": 1, "models": models}))
        assert cli("report", run, "--evaluation", file).status == 0
        said = Page((run / "report.html").read_text()).said
        assert "PIQA acc norm % 75.00 ± 1.00 50.00 ± 1.00 −25.00" in said

    @pytest.mark.parametrize("other", ["elsewhere", "run"])
    def test_results_of_another_model_are_not_shown(self, cli, run, tmp_path, other):
        file = tmp_path / "scores.json"
        models = [evaluated(file, run.parent / other, 12345, 0.5)]
        file.write_text(json.dumps({"format": 1, "models": models}))
        done = cli("report", run, "--evaluation", file)
        assert done.status == 1
        assert "has no results of" in done.err
