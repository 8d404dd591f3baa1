"""The report's page: damaged runs, charts, a real browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from adapt_pruner.errors import LoadingError
from adapt_pruner.report import charts
from adapt_pruner.report.page import render
from adapt_pruner.report.record import read_run, read_training
from adapt_pruner.report.series import DARK, LIGHT, Columns, training_of
from adapt_pruner.report.training_pictures import draw_loss
from report_runs import train

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr",
]  # fmt: skip


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

    @pytest.mark.parametrize("place", ["99/kv-groups", "99/neurons", "-7/neurons", "99/layers"])
    def test_layer_that_is_none(self, cli, run, place):
        record = json.loads((run / "pruning.json").read_text())
        record["edits"][0]["axes"][place] = {"units": 2, "kept": [0]}
        (run / "pruning.json").write_text(json.dumps(record))
        assert re.search("tells of layer 99|-7/neurons", self.refused(cli, run))

    @pytest.mark.parametrize("total", [0, -1, 10**40])
    def test_size_that_is_none(self, cli, run, total):
        record = json.loads((run / "run.json").read_text())
        record["after"]["total"] = total
        (run / "run.json").write_text(json.dumps(record))
        assert "sizes must be positive" in self.refused(cli, run)

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
        drawn = str(charts.columns("id", Columns("x", "Neurons", [10, None], [5, 0])))
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

    def test_pictures_show_what_the_page_shows(self, run):
        train(run, [3 + math.sin(i) for i in range(90)], [(0, 900, 9.0), (4000, 800, 8.0)])
        steps, phases = read_training(run)
        curve = training_of(steps, phases)
        plot = draw_loss(steps, phases).axes[0]
        each, mean, *cuts = plot.get_lines()
        assert list(zip(*each.get_data(), strict=True)) == curve.points
        assert list(zip(*mean.get_data(), strict=True)) == curve.means
        assert [cut.get_xdata()[0] for cut in cuts] == [tokens for tokens, _ in curve.cuts]
        assert mean.get_color() == LIGHT["after"]
        page = render([read_run(run)])
        for colors in (LIGHT, DARK):
            assert all(f"--{name}: {color};" in page for name, color in colors.items())
        drawn = re.findall(r'<polyline points="([^"]+)" class="curve"', page)
        assert len(curve.means) in [len(points.split()) for points in drawn]

    def test_equal_ratios_are_equal_distances(self):
        assert charts.log_ticks(21.7, 48.0) == [20, 30, 50]
        assert charts.log_ticks(10, 10) == [10]
        assert charts.log_ticks(20, 1e6) == [10, 100, 1e3, 1e4, 1e5, 1e6]
        points = [charts.Point(float(i), y, str(i)) for i, y in enumerate((10.0, 100.0, 1000.0))]
        drawn = str(charts.scatter("id", "t", "x", points, "said", is_log=True))
        low, middle, high = (float(y) for y in re.findall(r' cy="([\d.]+)"', drawn))
        assert low - middle == pytest.approx(middle - high)

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
