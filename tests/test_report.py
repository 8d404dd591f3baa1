"""The report: what it says, that it says it of every kind of run, and how it looks in a browser."""

from __future__ import annotations

import html
import json
import math
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from adapt_pruner.errors import LoadingError
from adapt_pruner.report import charts, samples
from adapt_pruner.report.page import render
from adapt_pruner.report.record import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr",
]  # fmt: skip
VOID = {"meta", "link", "br", "img", "hr", "input"}


@pytest.fixture(scope="module")
def pruned(llama, text_file, tmp_path_factory) -> Path:
    """Directory of a run on the tiny Llama, with quality measured. Not to be written to."""
    from adapt_pruner.methods import make_settings
    from adapt_pruner.run import Request, run_pruning

    directory = tmp_path_factory.mktemp("runs") / "tiny & <pruned>"
    settings = make_settings(
        steps=3, windows=8, window_length=12, calibration=str(text_file), device="cpu"
    )
    run_pruning(Request(str(llama), settings, 0.4, evaluate=str(text_file)), directory)
    return directory


@pytest.fixture
def run(pruned, tmp_path) -> Path:
    """A copy of that directory, to change."""
    return Path(shutil.copytree(pruned, tmp_path / "run"))


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


def train(run: Path, losses: list[float], phases: list[tuple[int, int, float | None]]) -> None:
    """Write the training log: one step of 100 tokens per loss; (from token, size, perplexity)."""
    lines = [
        {"step": i, "phase": 1, "tokens": 100 * i, "loss": loss, "learning_rate": 1e-4,
         "tokens_per_second": 5.0}
        for i, loss in enumerate(losses, 1)
    ]  # fmt: skip
    (run / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "phases.json").write_text(
        json.dumps(
            [
                {"phase": i, "tokens_before": start, "parameters": size, "widths": [],
                 "evaluation": None if quality is None else {"perplexity": quality}}
                for i, (start, size, quality) in enumerate(phases, 1)
            ]
        )
    )  # fmt: skip


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


class TestBadInput:
    def refused(self, cli, *arguments) -> str:
        done = cli("report", *arguments)
        assert done.status != 0
        assert "Traceback" not in done.err
        assert done.err.startswith("adapt-pruner: error: ")
        return done.err

    def test_no_run(self, cli, tmp_path, llama):
        assert "holds no run.json; name a directory" in self.refused(cli, tmp_path / "absent")
        assert "holds no run.json" in self.refused(cli, llama)
        assert "Missing argument" in self.refused(cli)

    @pytest.mark.parametrize(
        ("file", "content", "says"),
        [
            ("run.json", "{", "run.json' cannot be read"),
            ("run.json", "[]", "run.json' is not what it should be"),
            ("run.json", '{"format": 2}', "format: Input should be 1"),
            ("config.json", "", "config.json' cannot be read"),
            ("recipe.yaml", "a: [", "recipe.yaml' is not YAML"),
            ("pruning.json", '{"layers": 3}', "pruning.json' is not what it should be: layers"),
            ("phases.json", '[{"phase": 1}]', "phases.json' is not what it should be"),
            ("training.jsonl", "{}\n{}\n", "Line 1 of"),
        ],
    )
    def test_damaged_files(self, cli, run, file, content, says):
        before = (run / "report.html").read_text()
        (run / file).write_text(content)
        assert says in self.refused(cli, run)
        assert (run / "report.html").read_text() == before

    def test_lacks_config(self, run):
        (run / "config.json").unlink()
        with pytest.raises(LoadingError, match=r"config\.json"):
            read_run(run)

    def test_other_files_are_not_replaced(self, cli, run, tmp_path):
        notes = tmp_path / "notes.html"
        notes.write_text("mine")
        assert "exists and is no report" in self.refused(cli, run, "-o", notes)
        assert "is a directory" in self.refused(cli, run, "-o", tmp_path)
        assert notes.read_text() == "mine"
        assert cli("report", run, "-o", notes, "--overwrite").status == 0
        assert cli("report", run, "-o", notes).status == 0  # now it is a report

    def test_place_that_cannot_be_written(self, cli, run):
        said = self.refused(cli, run, "-o", run / "run.json" / "page.html")
        assert "could not be written" in said

    def test_prompts(self, cli, run):
        said = self.refused(cli, run, "--prompt", "the", "--max-new-tokens", 10**6)
        assert "The model reads at most" in said


class TestCharts:
    def test_thinning_keeps_means(self):
        points = [(float(i), float(i % 2)) for i in range(4 * charts.MANY)]
        thin = charts.thinned(points)
        assert len(thin) == charts.MANY
        assert all(y == 0.5 for _, y in thin)

    def test_places_are_shares(self):
        drawn = str(charts.columns("id", "title", [10, None], [5, 0]))
        bars = re.findall(
            r'<rect x="([\d.]+)%" y="([\d.]+)" width="[\d.]+%" height="([\d.]+)', drawn
        )
        full, left = ([float(v) for v in bar] for bar in bars)  # the second layer has no MLP
        assert full[0] == left[0] == 7.0  # 14 % of half the width
        assert left[2] * 2 == full[2]
        assert "In all 50% stay" in drawn

    def test_hundred_layers_stay_apart(self):
        drawn = str(charts.dots("id", "t", {i: (32, list(range(16))) for i in range(100)}, 100))
        radius = float(re.findall(r' r="([\d.]+)"', drawn)[0])
        assert 2 * radius < 340 / 100
        assert drawn.count('class="gone"') == 1600

    def test_one_point_of_each(self):
        assert "A curve of 1 points" in str(charts.line("i", "t", "x", [(5.0, 2.0)]))
        assert "nan" not in str(charts.heat_map("i", "t", [[0.0, 0.0]])).lower()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Run Chromium on a page. Returns its output and what it logged to the console."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    profile = tmp_path_factory.mktemp("chromium")

    def look(page: Path, *flags: str) -> tuple[str, list[str]]:
        done = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return look


MEASURE = """<script>
const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, pre")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
const small = [...document.querySelectorAll("svg text")].filter(e =>
  getComputedStyle(e).display !== "none" && e.getBoundingClientRect().height < 11).length;
const page = document.documentElement.scrollWidth;
parent.document.title = JSON.stringify({width: innerWidth, page, wide, small,
  paper: getComputedStyle(document.body).backgroundColor});
</script></body>"""
FRAME = """<html style="color-scheme: light dark"><title></title>
<iframe style="border: 0; color-scheme: light dark" width="{}" height="900" srcdoc="{}"></iframe>"""
"""A headless window is no narrower than 500 pixels, a frame in it may be."""


class TestBrowser:
    @pytest.mark.parametrize("width", [380, 1400])
    @pytest.mark.parametrize(("theme", "dark"), [("1", False), ("0", True)])
    def test_fits_the_screen_in_both_themes(self, browser, run, tmp_path, width, theme, dark):
        train(run, [3 + math.sin(i) for i in range(900)], [(0, 900, 9.0), (20_000, 800, 8.0)])
        page = tmp_path / "page.html"
        source = render([read_run(run), read_run(run)]).replace("</body>", MEASURE)
        page.write_text(FRAME.format(width, html.escape(source)))
        dom, console = browser(
            page, "--window-size=1500,900", "--dump-dom",
            f"--blink-settings=preferredColorScheme={theme}",
        )  # fmt: skip
        assert console == []
        found = json.loads(re.search(r"<title>(.*?)</title>", dom).group(1))  # type: ignore[union-attr]
        assert found["page"] <= found["width"] == width
        assert found["wide"] == []
        assert found["small"] == 0
        red = int(re.findall(r"\d+", found["paper"])[0])
        assert (red < 60) == dark

    def test_errors_would_be_seen(self, browser, tmp_path):
        page = tmp_path / "bad.html"
        page.write_text("<script>console.error('wrong')</script>")
        _, console = browser(page, "--dump-dom")
        assert any("wrong" in line for line in console)

    @pytest.mark.parametrize("width", [380, 1400])
    def test_screenshot_is_not_empty(self, browser, run, tmp_path, width):
        from matplotlib.image import imread

        shot = tmp_path / "shot.png"
        browser(run / "report.html", f"--window-size={width},1600", f"--screenshot={shot}")
        pixels = imread(shot)
        assert pixels.shape[1] == width
        assert len({tuple(p) for row in pixels[::7, ::3] for p in row}) > 20
