"""Wrong text and places, and what Python is told of them."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
import torch
from torch import nn

from adapt_pruner import (
    CalibrationData,
    load_calibration,
    make_settings,
    prune,
    replay,
)
from adapt_pruner.data import templates
from adapt_pruner.errors import (
    AdaptPrunerError,
    CalibrationError,
    InvalidSettings,
    InvalidTarget,
    LoadingError,
    UnsupportedModel,
)
from picomodels import build

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMB = "{% set a = 'x' * 10000000 %}{% for i in range(99999) %}{{ a }}{% endfor %}"


class TestSilence:
    """What would run, and mean something else than its user thinks."""

    def test_multiple_that_cuts_no_neuron(self, refuse):
        for multiple in (96, 1_000_000):
            says = ("multiple: the widest MLP has 96 neurons", "none could be cut")
            refuse("--multiple", multiple, says=says)

    @pytest.mark.parametrize("option", ["--evaluate", "--calibration", "--recipe", "--device"])
    @pytest.mark.parametrize("value", ["", "  "])
    def test_empty_value(self, refuse, option, value):
        refuse(option, value, says=f"The argument after {option} is empty", status=2)

    def test_empty_value_in_a_recipe(self, refuse, workplace):
        for key, says in (("evaluate", "evaluate is empty"), ("calibration", "calibration: ")):
            (workplace / "recipe.yaml").write_text(f"{key}: ''")
            flags = () if key == "evaluate" else ("--calibration", "text.txt")
            if not flags:
                refuse("--recipe", "recipe.yaml", says=says)
            with pytest.raises(InvalidSettings, match="at least 1 character"):
                make_settings(calibration="")

    @pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "1e9", "x"])
    @pytest.mark.parametrize("option", ["--max-hours", "--gpu-tflops"])
    def test_limit_that_is_none(self, cli, workplace, option, value):
        done = cli("accel", "llama", "-o", "out", option, value)
        assert done.status == 2
        assert option in done.err
        assert not (workplace / "out").exists()

    @pytest.mark.parametrize(
        ("limit", "says"),
        [
            ("1e-300", "less than one"),
            ("0.001", "less than one"),
            ("1.5", "whole number of items"),
            ("nan", "finite number"),
            ("1e300", "less than or equal to"),
        ],
    )
    def test_limit_that_takes_nothing(self, cli, workplace, limit, says):
        done = cli("evaluate", "llama", "--text", "text.txt", "--limit", limit, "--window", 16)
        assert done.status == 1
        assert "limit: " in done.err
        assert says in done.err

    def test_more_tokens_than_a_model_reads(self, cli, workplace):
        for command in (("run", "llama", "a", "--tokens"), ("bench", "llama", "--new-tokens")):
            done = cli(*command, 9_999_999)
            assert done.status == 1
            assert "the model reads at most 64 tokens" in done.err.lower()

    def test_answers_of_plain_text(self, cli, workplace):
        done = cli(
            "accel", "llama", "-o", "out", "--data", "text.txt", "--tokens", 512, "--alpha", 0,
            "--sequence-length", 16, "--batch-tokens", 64, "--loss-on", "answers", "--sparsity",
            0.2, "--calibration", "text.txt", "--windows", 4, "--window-length", 12, "--repeat",
        )  # fmt: skip
        assert done.status == 1
        assert "loss_on: the data are plain text, without answers" in done.err

    def test_demo_is_silent_before_it_refuses(self, cli, workplace):
        done = cli("demo", "-o", "out", "--sparsity", 2)
        assert done.status == 1
        assert done.out == ""
        assert "got 2" in done.err


class TestPlaces:
    """Outputs that are no ordinary files."""

    @pytest.mark.parametrize("kind", ["pipe", "link", "thesis", "long"])
    def test_file_that_is_not_replaced(self, cli, workplace, kind):
        place = workplace / ("a" * 300 if kind == "long" else "out.json")
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "link":
            (workplace / "thesis").write_text("years of work")
            place.symlink_to("thesis")
        elif kind == "thesis":
            place.write_text("years of work")
        for command in (("inspect", "llama", "--json"), ("report", "llama", "-o")):
            done = cli(*command, place)
            assert done.status == 1
            assert done.err.startswith("adapt-pruner: error: ")
            assert "Unexpected" not in done.err
        if kind in ("link", "thesis"):
            assert place.read_text() == "years of work"
        if kind == "pipe":
            assert place.is_fifo()

    def test_results_are_replaced(self, cli, workplace):
        for _ in range(2):
            assert cli("inspect", "llama", "--json", "out.json").status == 0

    @pytest.mark.parametrize("name", ["/dev/zero", "pipe", "circle"])
    def test_input_without_an_end(self, cli, workplace, name):
        os.mkfifo(workplace / "pipe")
        (workplace / "circle").symlink_to("circle")
        for command in (
            ("prune", "llama", "-o", "out", "--sparsity", 0.2, "--recipe", name),
            ("prune", "llama", "-o", "out", "--sparsity", 0.2, "--calibration", name),
            ("prune", name, "-o", "out", "--sparsity", 0.2),
            ("compare", "llama", "-o", "out", "--evaluate", "text.txt", "--variants", name),
            ("report", name),
        ):
            done = cli(*command)
            assert done.status == 1, command
            assert "Unexpected" not in done.err
            assert "Out of memory" not in done.err
        assert not (workplace / "out").exists()

    @pytest.mark.parametrize("template", [LOOP, LOOP + "{% generation %}{% endgeneration %}", BOMB])
    def test_template_without_an_end(self, cli, workplace, monkeypatch, template):
        monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 0.2)
        (workplace / "loop.jinja").write_text(template)
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (workplace / "chat.jsonl").write_text((json.dumps({"messages": said}) + "\n") * 1_000)
        (workplace / "mixture.yaml").write_text(
            "sources: [chat.jsonl]\ndefault_chat_template: loop.jinja"
        )
        began = time.perf_counter()
        done = cli(
            "accel", "llama", "-o", "out", "--data", "mixture.yaml", "--tokens", 512, "--alpha", 0,
            "--sequence-length", 16, "--batch-tokens", 64, "--sparsity", 0.2,
            "--calibration", "text.txt", "--windows", 4, "--window-length", 12, "--repeat",
        )  # fmt: skip
        assert done.status == 1
        assert re.search(r"longer than 0\.2 s for one|fills the memory for one", done.err)
        assert time.perf_counter() - began < 30
        assert not (workplace / "out").exists()


class TestCalibration:
    @pytest.mark.parametrize("name", ["no.txt", "./nowhere", "/no/where", "no.jsonl", "no.parquet"])
    def test_missing(self, refuse, name):
        refuse(calibration=name, says=f"There is no text file or directory '{name}'")

    def test_missing_text_for_evaluation(self, refuse):
        refuse("--evaluate", "no.txt", says="There is no text file or directory 'no.txt'")

    @pytest.mark.parametrize("name", ["some-lab/some-text", "nowhere"])
    def test_data_set_on_the_hub_while_offline(self, refuse, name):
        says = (f"Data set '{name}' cannot be read", "local txt, jsonl, json or parquet file")
        refuse(calibration=name, says=says)

    @pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.parquet"])
    def test_empty(self, refuse, workplace, name):
        (workplace / name).touch()
        says = (f"'{name}' has no document of at least 12 tokens", "it is empty", "Use other text")
        refuse(calibration=name, says=says)

    @pytest.mark.parametrize("text", ["\n\n", '{"text": ""}\n{"text": null}\n'])
    def test_nothing_but_blank_lines(self, refuse, workplace, text):
        (workplace / "blank.jsonl").write_text(text)
        refuse(calibration="blank.jsonl", says="it is empty")

    def test_documents_too_short(self, refuse, workplace):
        (workplace / "short.txt").write_text("one\n<|endoftext|>\nseven\n")
        says = ("at least 12 tokens", "the longest of 2 has 5", "smaller --window-length")
        refuse(calibration="short.txt", says=says)

    @pytest.mark.parametrize(
        ("name", "text", "says"),
        [
            ("bad.jsonl", '{"text": "abc"}\n{"text": "abc\n', "line 2 is not valid JSON"),
            ("bad.jsonl", "no json at all\n", "line 1 is not valid JSON"),
            ("bad.json", "{", "line 1 is not valid JSON"),
            ("bad.json", "[1", "is not valid JSON"),
            ("bad.json", "[1]", "record 1 must be an object"),
            ("bad.parquet", "no parquet at all", "is no parquet file that can be read"),
        ],
    )
    def test_malformed(self, refuse, workplace, name, text, says):
        (workplace / name).write_text(text)
        refuse(calibration=name, says=(f"'{name}' ", says))

    def test_malformed_file_among_others_is_named(self, refuse, workplace):
        data = workplace / "data"
        data.mkdir()
        (data / "a.jsonl").write_text('{"text": "abc"}\n' * 3)
        (data / "b.jsonl").write_text('{"text": "abc"}\n{"text": "abc\n')
        (data / "c.jsonl").write_text('{"text": "abc"}\n' * 3)
        refuse(calibration="data", says="'data/b.jsonl' line 2 is not valid JSON")

    def test_missing_column(self, refuse, workplace):
        (workplace / "data.jsonl").write_text('{"content": "abc", "id": 1}\n')
        says = ("no column 'text'; it has content, id", "--text-column")
        refuse(calibration="data.jsonl", says=says)
        says = ("no column 'body'; it has content, id", "--text-column")
        refuse("--text-column", "body", calibration="data.jsonl", says=says)

    def test_column_that_is_not_text(self, refuse, workplace):
        (workplace / "data.jsonl").write_text('{"text": 7}\n')
        says = ("Column 'text' of 'data.jsonl' holds 7, which is not text", "--text-column")
        refuse(calibration="data.jsonl", says=says)

    def test_not_utf8(self, refuse, workplace):
        (workplace / "latin.txt").write_bytes("café".encode("latin-1"))
        refuse(calibration="latin.txt", says="'latin.txt' line 1 is not UTF-8 text")

    def test_files_of_no_known_form(self, refuse, workplace):
        (workplace / "data").mkdir()
        (workplace / "data" / "table.csv").write_text("text\nabc\n")
        for name in ("data", "data/table.csv"):
            says = (f"'{name}' holds no text that can be read", ".json, .jsonl, .parquet, .txt")
            refuse(calibration=name, says=says)

    def test_existing_result_survives(self, refuse, workplace):
        (workplace / "out").mkdir()
        (workplace / "out" / "thesis.txt").write_text("years of work")
        refuse("--overwrite", calibration="no.txt", says="that no run wrote")


class TestPython:
    """The same care for those who call the library."""

    @pytest.fixture
    def model(self) -> nn.Module:
        return build("llama", torch.float32)

    @pytest.mark.parametrize(
        ("arguments", "error", "says"),
        [
            ({"sparsity": 20}, InvalidTarget, r"got 20\. Did you mean 0\.2\?"),
            ({}, InvalidTarget, "Give the target once"),
            ({"sparsity": 0.2, "params": 1000}, InvalidTarget, "Give the target once"),
            ({"params": 10**9}, InvalidTarget, "above the model's 110,336"),
            ({"sparsity": 0.2, "preset": "bst"}, InvalidSettings, "Did you mean 'best'"),
            ({"sparsity": 0.2, "step": 3}, InvalidSettings, "no setting 'step'. .* 'steps'"),
            ({"sparsity": 0.2, "steps": "x"}, InvalidSettings, "steps: .*got 'x'"),
            (
                {"sparsity": 0.2, "settings": make_settings(), "steps": 3},
                InvalidSettings,
                r"`settings` or single ones, not both; got \['steps'\]",
            ),
            ({"sparsity": 0.2, "protect_layers": (5,)}, InvalidSettings, "layers 0 to 2; got 5"),
        ],
    )
    def test_arguments(self, model, calibration, arguments, error, says):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(error, match=says):
            prune(model, calibration=calibration, **arguments)
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_text_without_a_tokenizer(self, model, text_file):
        with pytest.raises(InvalidSettings, match="needs the model's tokenizer; got None"):
            prune(model, sparsity=0.2, calibration=text_file)

    def test_window_longer_than_the_context(self, model, tokenizer, text_file):
        with pytest.raises(InvalidSettings, match="at most 64 tokens; got 65"):
            prune(model, tokenizer, sparsity=0.2, calibration=text_file, window_length=65)

    def test_model_of_another_kind(self, calibration):
        class Other(nn.Module):
            config = build("llama").config

        with pytest.raises(UnsupportedModel, match=r"decoder layers at 'model\.layers'; got Other"):
            prune(Other(), sparsity=0.2, calibration=calibration)

    def test_layers_of_another_kind(self, model, calibration):
        model.model.layers[1].mlp.up_proj = nn.Identity()
        with pytest.raises(UnsupportedModel, match=r"'mlp\.up_proj' to be .*Linear; got Identity"):
            prune(model, sparsity=0.2, calibration=calibration)

    def test_no_documents(self):
        with pytest.raises(CalibrationError, match="it is empty"):
            CalibrationData([], window_length=4, num_windows=2)

    def test_source_that_does_not_exist(self, tokenizer):
        with pytest.raises(CalibrationError, match=r"no text file or directory 'no\.txt'"):
            load_calibration("no.txt", tokenizer, 4, 2)

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "{}",
        ],
    )
    def test_record_that_is_none(self, model, tmp_path, content):
        (tmp_path / "pruning.json").write_text(content)
        with pytest.raises(LoadingError):
            replay(model, tmp_path)

    def test_every_error_is_of_one_family(self):
        kinds = (CalibrationError, InvalidSettings, InvalidTarget, LoadingError, UnsupportedModel)
        assert all(issubclass(kind, AdaptPrunerError) for kind in kinds)
