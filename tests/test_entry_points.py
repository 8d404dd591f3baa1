"""What another installed package adds is used like what this one has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from adapt_pruner.methods import METHODS, settings_fields
from picomodels import build

MODULE = """
from dataclasses import replace

from adapt_pruner.methods.adapt_pruner import METHOD, AdaptPrunerSettings
from adapt_pruner.model.architectures import Architecture
from adapt_pruner.score.importance import Importance


class Settings(AdaptPrunerSettings):
    method: str = "foreign-method"


METHOD = replace(METHOD, settings=Settings, presets={}, summary="A method from elsewhere.")
LAST = Importance(lambda axis, statistics, seed=0: -1.0 * __import__("torch").arange(
    axis.num_units).float())
ROW = Architecture("arcee", "ArceeDecoderLayer", mlp_inputs=("mlp.up_proj",))
"""
ENTRIES = """[adapt_pruner.methods]
foreign-method = foreign:METHOD
[adapt_pruner.importances]
foreign-importance = foreign:LAST
[adapt_pruner.architectures]
arcee = foreign:ROW
broken = no_such_module:ROW
"""


@pytest.fixture
def run(tmp_path):
    """Run Python or the command line where a package that adds three rows is installed."""
    site = tmp_path / "site"
    info = site / "foreign-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "foreign.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_foreign_method_prunes_with_a_foreign_importance(run, llama, text_file, tmp_path):
    out = tmp_path / "out"
    run(
        "-m", "adapt_pruner", "prune", llama, "-o", out, "--sparsity", 0.2,
        "--method", "foreign-method", "--importance", "foreign-importance", "--cut", "neurons",
        "--steps", 1, "--tuning-steps", 1, "--windows", 4, "--window-length", 12,
        "--calibration", text_file,
    )  # fmt: skip
    record = json.loads((out / "pruning.json").read_text())
    assert record["settings"]["method"] == "foreign-method"
    assert record["settings"]["importance"] == "foreign-importance"
    for entry in record["edits"][0]["axes"].values():  # the last units score lowest
        assert entry["kept"] == list(range(len(entry["kept"])))
    assert record["after"]["total"] < build("llama", torch.float32).num_parameters()


def test_a_foreign_architecture_may_stand_beside_its_method(run, tmp_path):
    """Whatever is imported first; a package that is broken stops nobody else's models."""
    code = f"""if True:
        import adapt_pruner
        {{}}
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("arcee", **sizes))
        data = adapt_pruner.CalibrationData([torch.arange(60)] * 4, window_length=8, num_windows=4)
        adapt_pruner.prune(model, calibration=data, sparsity=0.3, method="foreign-method",
            steps=1, tuning_steps=0)
        model.save_pretrained({str(tmp_path / "arcee")!r})
        again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "arcee")!r})
        assert again.num_parameters() == model.num_parameters(), "layers of their own widths"
        print(len({{{{layer.mlp.up_proj.out_features for layer in again.model.layers}}}}), "widths")
    """
    for first in ("import transformers", "import adapt_pruner.model.anatomy"):
        assert run("-c", code.format(first)).splitlines()[-1].endswith(" widths")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("no_such_module:ROW", "cannot be imported: No module named"),
        ("foreign_exit:ROW", "cannot be imported: bye"),
        ("json:dumps", "which is no Method but <function dumps"),
    ],
)
def test_a_broken_row_stops_nothing_else(cli, tmp_path, monkeypatch, value, says):
    (tmp_path / "foreign_exit.py").write_text("raise SystemExit('bye')")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("bad", value, METHODS.group)
    monkeypatch.setattr(METHODS, "_foreign", {"bad": point})
    done = cli("prune", "llama", "-o", tmp_path / "out", "--method", "bad")
    assert done.status == 1
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert "adapt-pruner" in cli("methods").out
    assert "ridge" in settings_fields()
    assert cli("methods", "bad").status == 1
