"""Comparisons that are made: stored, resumed, printed."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import yaml

from adapt_pruner.comparison import grid
from adapt_pruner.comparison.cells import ComparisonRequest
from adapt_pruner.comparison.table import Tables, escape_markdown
from adapt_pruner.comparison.variants import VARIANTS, Variant, make_variants
from adapt_pruner.errors import NonFiniteError, WritingError
from adapt_pruner.evaluation import store as stored
from adapt_pruner.settings import EvaluationSettings
from comparisons import values


@pytest.fixture
def request_of(llama, text_file, tmp_path):
    """A small comparison on the tiny Llama."""

    def make(**changes) -> ComparisonRequest:
        overrides = {"steps": 1, "tuning_steps": 1, "windows": 4, "window_length": 12,
                     "device": "cpu", "calibration": str(text_file)}  # fmt: skip
        values = {
            "model": str(llama),
            "variants": make_variants(["best", "random"], VARIANTS, (), overrides),
            "sparsities": [0.3],
            "seeds": range(2),
            "text": [str(text_file)],
            "evaluation": EvaluationSettings(limit=3, window=64, device="cpu"),
        }
        return ComparisonRequest(**{**values, **changes})

    return make


@pytest.fixture
def store(tmp_path):
    from adapt_pruner.evaluation import ResultStore

    return ResultStore(tmp_path / "cache")


@pytest.fixture
def pruned(monkeypatch) -> list[int]:
    """Holds an entry for each pruning that was really made."""
    count: list[int] = []
    prune = grid.prune

    def counting(*args, **kwargs):
        count.append(1)
        return prune(*args, **kwargs)

    monkeypatch.setattr(grid, "prune", counting)
    return count


class TestRuns:
    def test_second_time_nothing_is_computed(self, request_of, store, pruned):
        first = grid.compare(request_of(), store)
        assert len(pruned) == 4
        again = grid.compare(request_of(), store)
        assert len(pruned) == 4
        assert values(again) == values(first)
        assert all(result.was_cached for result in again.results)

    def test_other_code_computes_anew(self, request_of, store, pruned, monkeypatch):
        request = request_of(seeds=[0])
        first = grid.compare(request, store)
        of_modules = grid.code.of_modules
        changed = [grid.code.TEXT]
        monkeypatch.setattr(
            grid.code, "of_modules", lambda r: "x" if r in changed else of_modules(r)
        )
        measured = grid.compare(request, store)
        assert not any(result.was_cached for result in measured.results)
        assert values(measured) == values(first)
        count = len(pruned)
        changed.append(grid.code.PRUNING)
        grid.compare(request, store)
        assert len(pruned) == count + 2

    def test_figures_of_several_commits_are_told(self, request_of, store, monkeypatch):
        monkeypatch.setattr(stored, "git_hash", lambda: "0123456789")
        first = grid.compare(request_of(seeds=[0]), store)
        assert "commits" not in " ".join(Tables(first).notes())
        monkeypatch.setattr(stored, "git_hash", lambda: "abcdefabcd-dirty")
        notes = " ".join(Tables(grid.compare(request_of(), store)).notes())
        assert "at 2 commits (0123456, abcdefa-dirty)" in notes

    def test_same_figure_as_evaluate_gives(self, request_of, store, tmp_path):
        from adapt_pruner.evaluation import evaluate

        found = grid.compare(request_of(save_to=tmp_path / "models", seeds=[0]), store)
        asked = request_of()
        measured = evaluate(
            str(tmp_path / "models" / "best-0.3-seed0"),
            text=asked.text, settings=asked.evaluation, store=store,
        )  # fmt: skip
        assert measured.scores == found.results[0].scores
        assert measured.num_cached == 1  # they share the store
        assert measured.parameters == found.results[0].parameters

    def test_interrupted_run_goes_on(self, request_of, store, pruned):
        class Stop(grid.ComparisonListener):
            def on_result(self, comparison, result):
                if len(comparison.results) == 3:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            grid.compare(request_of(), store, Stop())
        assert len(pruned) == 3
        assert len(grid.compare(request_of(), store).results) == 4
        assert len(pruned) == 4

    def test_larger_comparison_takes_over(self, request_of, store, pruned):
        grid.compare(request_of(seeds=[0]), store)
        grid.compare(request_of(), store)
        assert len(pruned) == 4

    def test_other_measure_makes_the_model_again(self, request_of, store, pruned):
        grid.compare(request_of(seeds=[0]), store)
        grid.compare(request_of(seeds=[0], evaluation=EvaluationSettings(limit=2)), store)
        assert len(pruned) == 4

    def test_model_that_comes_out_different(self, request_of, store, pruned, monkeypatch):
        """On another machine: the figures are of the model made now, and kept under its name."""
        first = grid.compare(request_of(seeds=[0]), store)
        store_as = grid.prune

        def other(model, *args, **kwargs):
            result = store_as(model, *args, **kwargs)
            model.lm_head.weight.data.mul_(1.5)
            return result

        monkeypatch.setattr(grid, "prune", other)
        changed = {"evaluation": EvaluationSettings(limit=2, window=64)}
        second = grid.compare(request_of(seeds=[0], **changed), store)
        third = grid.compare(request_of(seeds=[0], **changed), store)
        assert values(second) == values(third) != values(first)
        assert len(pruned) == 4

    def test_nan_leaves_one_cell_empty(self, request_of, store, monkeypatch):
        prune = grid.prune

        def failing(*args, settings, **kwargs):
            if settings.importance == "random":
                raise NonFiniteError("The loss is NaN.")
            return prune(*args, settings=settings, **kwargs)

        monkeypatch.setattr(grid, "prune", failing)
        found = grid.compare(request_of(seeds=[0]), store)
        assert [result.error for result in found.results] == ["", "The loss is NaN."]
        assert "| random |  | – | – |" in Tables(found).markdown()

    def test_models_of_another_run_are_replaced(self, request_of, store, tmp_path):
        place = tmp_path / "models"
        first = grid.compare(request_of(save_to=place, seeds=[0]), store)
        variants = [Variant(v.name, v.settings.model_copy(update={"windows": 6}))
                    for v in request_of().variants]  # fmt: skip
        second = grid.compare(request_of(save_to=place, seeds=[0], variants=variants), store)
        third = grid.compare(request_of(save_to=place, seeds=[0]), store)
        saved = json.loads((place / "best-0.3-seed0" / "run.json").read_text())
        assert saved["settings"]["windows"] == 4
        assert values(third) == values(first) != values(second)

    def test_names_with_markup_are_shown_as_they_are(self):
        name = "<img src=x onerror=alert(1)>_*[a](http://b)*_`c`\n# d"
        shown = escape_markdown(name)
        assert "<img" not in shown.replace(r"\<", "")
        assert "\n" not in shown
        assert re.sub(r"\\(.)", r"\1", shown) == name.replace("\n", " ")

    def test_changed_model_is_kept_and_a_missing_one_made_again(
        self, request_of, store, tmp_path, pruned
    ):
        asked = request_of(save_to=tmp_path / "models", seeds=[0])
        grid.compare(asked, store)
        weights = tmp_path / "models" / "best-0.3-seed0" / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:100])
        with pytest.raises(WritingError, match=r"changed since: model\.safetensors"):
            grid.compare(asked, store)
        shutil.rmtree(weights.parent)
        grid.compare(asked, store)
        assert weights.read_bytes() == whole
        assert len(pruned) == 3

    def test_several_texts_have_a_geometric_mean(self, request_of, store, text_file, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text("and the " * 40)
        found = grid.compare(request_of(text=[str(text_file), str(other)], seeds=[0]), store)
        scores = [s.value for s in found.dense.scores if s.metric == "token_perplexity"]
        assert scores[2] == pytest.approx(math.sqrt(scores[0] * scores[1]))


@pytest.fixture
def compare(cli, llama, text_file, tmp_path):
    """Run the command on the tiny Llama."""

    def run(*arguments, output=None, model=llama):
        return cli(
            "compare", model, "-o", output or tmp_path / "out", "--cache-dir", tmp_path / "cache",
            "--calibration", text_file, "--windows", 4, "--window-length", 12, "--steps", 2,
            "--tuning-steps", 1, "--device", "cpu", "--window", 64, "--limit", 3, *arguments,
        )  # fmt: skip

    return run


class TestCommand:
    def test_everything_is_written(self, compare, text_file, tmp_path):
        done = compare("--evaluate", text_file, "--methods", "paper,random", "--seeds", 2,
                       "--sparsities", "0.2,0.4", "--vary", "max_documents=9,12")  # fmt: skip
        assert done.status == 0, done.err
        out = tmp_path / "out"
        assert {file.name for file in out.iterdir()} == {
            "comparison.md", "comparison.tex", "comparison.csv", "comparison.json",
            "quality_over_size.svg", "quality_over_size.png",
            "quality_over_max_documents.svg", "quality_over_max_documents.png",
        }  # fmt: skip
        record = json.loads((out / "comparison.json").read_text())
        assert len(record["results"]) == 2 * 2 * 2 * 2
        assert record["methods"]["paper, max_documents 9"]["max_documents"] == 9
        assert "16 of 16" in done.err
        assert "paper, max_documents 9" in done.out
        assert compare("--evaluate", text_file, "--methods", "random", "--seeds", 1).status == 0

    def test_methods_of_ones_own(self, compare, text_file, tmp_path):
        file = tmp_path / "variants.yaml"
        file.write_text(yaml.safe_dump({"mine": {"importance": "magnitude-l1"}, "default": None}))
        done = compare("--evaluate", text_file, "--variants", file, "--seeds", 1,
                       "--sparsities", "0.2", "-q")  # fmt: skip
        assert done.status == 0, done.err
        assert "mine" in done.out
        assert "default" in done.out
        assert done.err == ""

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--methods", "papper"], "There is no method 'papper'. Did you mean 'paper'?"),
            (["--methods", ","], "expected names with commas; got ','"),
            (["--sparsities", "a"], "numbers such as 0.2,0.4; got 'a'"),
            (["--sparsities", "20"], "sparsity"),
            (["--sparsities", "0.2,0.99"], "below what is possible"),
            (["--seeds", "0"], "--seeds"),
            (["--vary", "amplitude=x", "--methods", "paper"], "Method 'paper': amplitude:"),
            (["--variants", "absent.yaml"], "There is no variants file 'absent.yaml'"),
            (["--window-length", "4000"], "window_length: the model reads at most"),
            (["--suite", "common"], "common"),
            (["--device", "cuda:77"], "device: 'cuda:77' is not available"),
        ],
    )
    def test_bad_input(self, compare, text_file, tmp_path, arguments, says):
        done = compare("--evaluate", text_file, *arguments)
        assert done.status != 0
        assert done.err.startswith("adapt-pruner: error: ")
        assert says in done.err
        assert not (tmp_path / "out").exists()

    def test_nothing_to_measure_by(self, compare):
        assert "name a text with --evaluate, a --suite or --tasks" in compare().err

    def test_texts_of_one_name(self, compare, text_file, tmp_path):
        other = tmp_path / text_file.name
        other.write_text("the of")
        assert "Two texts are called" in compare("--evaluate", text_file, "--evaluate", other).err

    @pytest.mark.parametrize(
        "content", ["- a\n", "a: 3\n", "a: {steps: [}\n", "a: {stepps: 3}\n", ""]
    )
    def test_bad_variants(self, compare, text_file, tmp_path, content):
        file = tmp_path / "variants.yaml"
        file.write_text(content)
        done = compare("--evaluate", text_file, "--variants", file)
        assert done.status == 1
        assert "Unexpected" not in done.err

    def test_output_of_something_else(self, compare, text_file, tmp_path):
        (tmp_path / "file").write_text("mine")
        assert "is a file" in compare("--evaluate", text_file, output=tmp_path / "file").err
        done = compare("--evaluate", text_file, output=tmp_path)
        assert "is not empty and holds no comparison" in done.err

    def test_interrupt_says_what_is_kept(self, compare, text_file, tmp_path, monkeypatch):
        count, prune = [], grid.prune

        def stop(*args, **kwargs):
            count.append(1)
            if len(count) == 2:
                raise KeyboardInterrupt
            return prune(*args, **kwargs)

        monkeypatch.setattr(grid, "prune", stop)
        done = compare("--evaluate", text_file, "--methods", "random", "--sparsities", "0.2")
        assert done.status != 0
        assert "Interrupted after 1 of 3 models. Their results are kept" in done.err
        assert "(n=1)" in (tmp_path / "out" / "comparison.md").read_text()

    def test_first_model_that_is_never_measured(self, compare, text_file, tmp_path, monkeypatch):
        asked = ["--evaluate", text_file, "--methods", "random", "--sparsities", 0.2, "--seeds", 1]
        with monkeypatch.context() as patch:
            patch.setattr(grid._Runner, "_make", _stopped)
            done = compare(*asked, "--save-models")
        assert "Interrupted after 0 of 1 models" in done.err
        out = tmp_path / "out"
        (out / "models").mkdir(exist_ok=True)
        (out / "pictures").mkdir()
        left = [
            out / ".comparison.md.partial-0123abcd",
            out / "pictures" / ".a.svg.partial-0123abcd",
        ]
        for file in left:
            file.write_text("half")
        assert compare(*asked, "--save-models").status == 0
        assert not any(file.exists() for file in left)


def _stopped(*args) -> None:
    raise KeyboardInterrupt
