"""Names on the hub, through the command line, with a hub on this machine."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import WORDS, Outcome
from fake_hub import FakeHub

SHARDS, ROWS = 6, 4000
"""Several times what is held to be shuffled."""
ACCEL = (
    "--tokens", "1280", "--sparsity", "0.3", "--phases", "2", "--batch-tokens", "64",
    "--sequence-length", "16", "--windows", "4", "--window-length", "12", "--alpha", "0",
)  # fmt: skip
PRUNE = ("--sparsity", "0.3", "--windows", "4", "--window-length", "12", "--steps", "2",
         "--tuning-steps", "1")  # fmt: skip

SERVE = """
import contextlib, io, json, os, sys, time
if os.environ["HF_ENDPOINT"].endswith(":9"):
    time.sleep = lambda seconds: None  # between attempts to connect
from adapt_pruner.cli import main
for line in sys.stdin:
    status = 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(json.loads(line))
        except SystemExit as exit_:
            status = exit_.code or 0
    print(json.dumps([status, out.getvalue()]), flush=True)
"""
"""Importing takes seconds, so one process runs all commands; huggingface_hub reads the environment
when it is imported, so that it cannot be this one."""


class Program:
    """The command line in a process of its own, in `place`, with the hub at `url`."""

    def __init__(self, place: Path, url: str):
        self.place, self.log = place, (place / "stderr").open("a+")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(place / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "ADAPT_PRUNER_CACHE": str(place / "cache"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE], cwd=place, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def __call__(self, *arguments: str) -> Outcome:
        assert self.process.stdin
        assert self.process.stdout
        start = self.log.seek(0, os.SEEK_END)
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        status, out = json.loads(self.process.stdout.readline())
        self.log.seek(start)
        return Outcome(status, out, self.log.read())

    def end(self) -> int:
        self.process.communicate()
        self.log.close()
        return self.process.returncode


@pytest.fixture(scope="module")
def place(tmp_path_factory, documents, llama) -> Path:
    """Working directory of the commands, with the hub's repositories below `hub`."""
    place = tmp_path_factory.mktemp("hub")
    (place / "local.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    data, rng = place / "hub" / "datasets" / "org", random.Random(0)
    (data / "words" / "data").mkdir(parents=True)
    for i in range(SHARDS):
        rows = [{"text": " ".join(rng.choices(WORDS, k=9))} for _ in range(ROWS)]
        file = data / "words" / "data" / f"train-{i:05}-of-{SHARDS:05}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (data / "words" / "README.md").write_text("# Words without metadata")
    (data / "empty").mkdir()
    (data / "empty" / "README.md").write_text("# No data at all")
    shutil.copytree(data / "words", data / "gated")
    configs = []
    for name in ("easy", "hard"):
        (data / "tasks" / name).mkdir(parents=True)
        for split in ("train", "test"):
            columns = {"instruction": documents, "output": [f"{name} {split}"] * len(documents)}
            pq.write_table(pa.table(columns), data / "tasks" / name / f"{split}.parquet")
        files = [{"split": s, "path": f"{name}/{s}.parquet"} for s in ("train", "test")]
        configs.append({"config_name": name, "data_files": files})
    (data / "tasks" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    _models(place, llama)
    return place


def _models(place: Path, llama: Path) -> None:
    models = place / "hub" / "models" / "org"
    for name in ("llama", "plan", "measured", "gated", "pickles", "code", "unknown"):
        shutil.copytree(llama, models / name)
    torch.save(load_file(llama / "model.safetensors"), models / "pickles" / "pytorch_model.bin")
    (models / "pickles" / "model.safetensors").unlink()
    for name in ("code", "unknown"):
        (models / name / "own.py").write_text(
            f"open('{place}/executed', 'w').close()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class Config(LlamaConfig): ...\n"
            "class Model(LlamaForCausalLM): config_class = Config\n"
        )
        config = json.loads((llama / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        config["model_type"] = "llama" if name == "code" else "own"
        (models / name / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def open_hub(place) -> Iterator[FakeHub]:
    with FakeHub(place / "hub") as hub:
        hub.gated = {"org/gated"}
        yield hub


@pytest.fixture
def hub(open_hub) -> FakeHub:
    open_hub.requests.clear()
    return open_hub


@pytest.fixture(scope="module")
def run(place, open_hub) -> Iterator[Program]:
    program = Program(place, open_hub.url)
    yield program
    assert program.end() == 0


@pytest.fixture(scope="module")
def run_without_hub(place, run) -> Iterator[Program]:
    """What `run` has fetched is in the cache, but the hub cannot be reached."""
    (place / "later").mkdir()
    program = Program(place, "http://127.0.0.1:9")
    yield program
    assert program.end() == 0


def test_plans_need_the_configuration_alone(hub, run):
    assert run("inspect", "org/plan").status == 0
    outcome = run("accel", "org/plan", "--dry-run", "--data", "org/words", *ACCEL)
    assert (outcome.status, outcome.err) == (0, "")
    assert run("prune", "org/plan", "--dry-run", *PRUNE).status == 0
    assert hub.fetched("org/plan") == {"config.json"}
    assert not any("datasets" in request for request in hub.requests)


def test_the_hub_gives_what_a_directory_gives(hub, run, place):
    names = {"of-hub": ("org/llama", "org/words"), "of-directory": (
        str(place / "hub/models/org/llama"), str(place / "hub/datasets/org/words"))}  # fmt: skip
    for output, (model, text) in names.items():
        outcome = run("prune", model, "-o", output, "--calibration", text, "--evaluate", text,
                      "--max-documents", "50", *PRUNE)  # fmt: skip
        assert (outcome.status, outcome.err) == (0, "")
    weights = [(place / output / "model.safetensors").read_bytes() for output in names]
    assert weights[0] == weights[1]
    record = json.loads((place / "of-hub" / "run.json").read_text())
    assert record["base_model"] == "org/llama"


def test_measurements_are_kept_under_the_commit_of_the_model(hub, run, run_without_hub, place):
    command = ("evaluate", "org/measured", "--text", "local.txt", "--json", "scores.json")
    outcome = run(*command)
    assert (outcome.status, outcome.err) == (0, "")
    assert "model.safetensors" in hub.fetched("org/measured")
    (found,) = json.loads((place / "scores.json").read_text())["models"]
    commit = hub.commit("models", "org/measured")
    assert found["records"][0]["key"]["model"] == {"name": "org/measured", "revision": commit}
    assert "results were measured before" in run_without_hub(*command).out


def test_text_of_the_hub_is_measured(hub, run):
    outcome = run("evaluate", "demo", "--text", "org/words", "--limit", "5")
    assert (outcome.status, outcome.err) == (0, "")
    assert "token_perplexity" in outcome.out


def test_a_mixture_is_streamed_as_far_as_needed_and_not_fetched_again(
    hub, run, run_without_hub, place
):
    (place / "mixture.yaml").write_text(yaml.safe_dump({"sources": [
        {"path": "org/words", "weight": 2},
        {"path": "org/tasks", "subset": "hard", "split": "test"},
        "local.txt",
    ]}))  # fmt: skip
    command = ("accel", "org/llama", "-o", "run", "--data", "mixture.yaml",
               "--calibration", "local.txt", *ACCEL)  # fmt: skip
    assert run(*command, "--stop-after", "1", "-q").status == 0
    assert 2 <= len(hub.fetched("org/words") - {"README.md"}) < SHARDS
    assert "hard/test.parquet" in hub.fetched("org/tasks")
    assert not any("easy" in file for file in hub.fetched("org/tasks"))
    outcome = run_without_hub(*command, "-q")
    assert (outcome.status, outcome.err) == (0, "")
    domains = json.loads((place / "run" / "run.json").read_text())["training"]["domains"]
    assert {name: domain["revision"] for name, domain in domains.items()} == {
        "words": hub.commit("datasets", "org/words"),
        "tasks": hub.commit("datasets", "org/tasks"),
        "local": None,
    }


def test_weights_in_pickles_are_neither_fetched_nor_converted(hub, run, place):
    outcome = run("prune", "org/pickles", "-o", "no", "--calibration", "local.txt", *PRUNE)
    assert outcome.status == 1
    assert "there is no model.safetensors, and weights in pickles are not read" in outcome.err
    assert "pytorch_model.bin" not in "".join(hub.requests)
    assert not any("/commits/" in request for request in hub.requests)
    assert not (place / "no").exists()


def test_remote_code_runs_only_when_trusted(hub, run, place):
    command = ("--calibration", "local.txt", *PRUNE)
    outcome = run("prune", "org/unknown", "-o", "unknown", *command)
    assert (outcome.status, "'own' cannot be pruned" in outcome.err) == (1, True)
    assert run("prune", "org/code", "-o", "code", *command).status == 0
    assert "own.py" not in "".join(hub.requests)
    assert not (place / "executed").exists()
    outcome = run("prune", "org/code", "-o", "trusted", "--trust-remote-code", *command)
    assert (outcome.status, outcome.err) == (0, "")
    assert (place / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("inspect", "org/nothing"), "no such directory here, and no such model on the hub"),
        (("inspect", "nothing"), "no such directory here, and no such model on the hub"),
        (("prune", "org/gated"), "access to it must be requested on its page"),
        (("--calibration", "org/nothing"), "'org/nothing' doesn't exist on the Hub"),
        (("--calibration", "nothing"), "'nothing' doesn't exist on the Hub"),
        (("--calibration", "org/gated"), "'org/gated' is a gated dataset on the Hub"),
        (("--calibration", "org/empty"), "doesn't contain any data files"),
        (("--calibration", "org/words", "--text-column", "body"), "no column 'body'; it has text"),
        (("--calibration", "org/tasks"), "'easy', 'hard'"),
        (("--evaluate", "org/nothing"), "'org/nothing' doesn't exist on the Hub"),
    ],
)
def test_what_the_hub_does_not_give(hub, run, place, arguments, says):
    if arguments[0].startswith("--"):
        arguments = ("prune", "org/llama", "--calibration", "local.txt", *arguments)
    if arguments[0] == "prune":
        arguments = (*arguments, "-o", "no", *PRUNE)
    assert_refused(run(*arguments), says, place)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"path": "org/nothing"}, "'org/nothing' doesn't exist on the Hub"),
        ({"path": "org/gated"}, "'org/gated' is a gated dataset on the Hub"),
        ({"path": "org/words", "revision": "v9"}, "Revision 'v9' doesn't exist"),
        ({"path": "org/words", "columns": {"text": "body"}}, "no column 'body'"),
        ({"path": "org/tasks"}, "['easy', 'hard']. Say which as `subset`"),
        ({"path": "org/tasks", "subset": "medium"}, "Available: ['easy', 'hard']"),
        ({"path": "org/tasks", "subset": "easy", "split": "dev"}, "splits: ['train', 'test']"),
    ],
)
def test_sources_that_the_hub_does_not_give(hub, run, place, source, says):
    """Before others are tokenised, which may take hours."""
    sources = [{"path": "org/words", "name": "others"}, source]
    (place / "bad.yaml").write_text(yaml.safe_dump({"sources": sources}))
    command = ("accel", "org/llama", "-o", "no", "--data", "bad.yaml")
    assert_refused(run(*command, "--calibration", "local.txt", *ACCEL), says, place)
    assert len(hub.fetched("org/words") - {"README.md"}) <= 2
    assert not list((place / "cache" / "data").glob("others-*"))


@pytest.mark.parametrize("option", ["--teacher", "--calibration", "--evaluate", "--exclude"])
def test_names_are_looked_up_before_data_are_tokenised(hub, run, place, option):
    arguments = ("--data", "org/words", "--calibration", "local.txt", *ACCEL,
                 "--alpha", "0.5", "--data-cache", "own-cache")  # fmt: skip
    outcome = run("accel", "org/llama", "-o", "no", *arguments, option, "org/nothing")
    assert_refused(outcome, "'org/nothing'", place)
    assert not list((place / "own-cache").glob("words-*"))


def test_hub_that_cannot_be_reached(run_without_hub, place):
    here = str(place / "hub/models/org/llama")
    prune = ("prune", here, "-o", "no", *PRUNE)
    accel = ("accel", here, "-o", "no", "--calibration", "local.txt", *ACCEL)
    for command, says in [
        (("inspect", "org/other"), "the hub cannot be reached"),
        ((*prune, "--calibration", "org/other"), "Couldn't reach 'org/other' on the Hub"),
        ((*accel, "--data", "org/other"), "Couldn't reach 'org/other' on the Hub"),
    ]:
        assert_refused(run_without_hub(*command), says, place)


def assert_refused(outcome: Outcome, says: str, place: Path) -> None:
    assert outcome.status == 1
    assert says in outcome.err
    assert outcome.err.startswith("adapt-pruner: error: ")
    assert outcome.err.count("\n") == 1
    assert not (place / "no").exists()
    assert not list((place / "cache" / "data").glob(".*/"))
