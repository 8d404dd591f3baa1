"""What an evaluation refuses, and its command line."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import task_items
from adapt_pruner import evaluate, load_model
from adapt_pruner.errors import (
    EvaluationError,
    InvalidSettings,
    MissingExtra,
    NonFiniteError,
    UnsupportedModel,
)
from adapt_pruner.evaluation import measure
from conftest import character_tokenizer
from picomodels import build

pytestmark = pytest.mark.usefixtures("own_results")
harness = pytest.importorskip("adapt_pruner.evaluation.harness")


class TestRefusals:
    def refuse(self, error: type[Exception], says: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(error, match=says):
            evaluate(*args, **kwargs)

    def test_suite(self):
        says = r"no suite 'comonsense'\. Did you mean 'commonsense'\? Known: .*perplexity"
        self.refuse(EvaluationError, says, "demo", suite="comonsense")

    def test_task(self, monkeypatch, data):
        small = harness.TaskManager  # all of lm-eval takes ten seconds to read
        root = Path(sys.modules["lm_eval"].__file__ or "").parent / "tasks"

        def manager(include_path, include_defaults=True):
            folders = [root / "arc", root / "super_glue" / "boolq"]
            return small(include_path=[*include_path, *folders], include_defaults=False)

        monkeypatch.setattr(harness, "TaskManager", manager)
        says = r"no task 'arc_esy'\. Did you mean 'arc_easy'\?"
        self.refuse(EvaluationError, says, "demo", tasks="boolq,arc_esy", task_data=data)

    def test_nothing(self):
        self.refuse(EvaluationError, "name a suite, tasks or a text", "demo")

    def test_missing_file_is_named_and_what_is_there(self, data, tmp_path):
        shutil.copy(data / "boolq.validation.jsonl", tmp_path)
        says = r"no data for task 'arc_easy': there is no 'arc_easy\.test\.jsonl'.* --tasks boolq\."
        self.refuse(EvaluationError, says, "demo", tasks="boolq,arc_easy", task_data=tmp_path)

    def test_missing_directory(self, tmp_path):
        says = "no directory '.*nowhere' with task data"
        self.refuse(EvaluationError, says, "demo", tasks="boolq", task_data=tmp_path / "nowhere")

    def test_another_split_is_not_taken(self, tmp_path):
        task_items.write_rows(
            tmp_path / "arc_easy.validation.jsonl", task_items.ITEMS["arc_easy.test"]
        )
        self.refuse(
            EvaluationError, r"no 'arc_easy\.test", "demo", tasks="arc_easy", task_data=tmp_path
        )

    @pytest.mark.parametrize(
        ("task", "row", "says"),
        [
            ("openbookqa", {"question": "x", "choices": {"text": ["a"], "label": ["A"]},
                            "answerKey": "A"}, "no column 'question_stem'"),
            ("boolq", {"passage": "x", "label": 0}, "'boolq' cannot be used: .*question"),
            ("boolq", {"passage": "x", "question": "y", "label": 2},
             "Item 2 .*answer 2, which is none of its 2 choices"),
            ("boolq", {"passage": "x", "question": "y", "label": -1}, "answer -1, which is none"),
        ],
    )  # fmt: skip
    def test_data_of_another_form(self, llama, tmp_path, task, row, says):
        split = "test" if task == "openbookqa" else "validation"
        good = (
            task_items.ITEMS["boolq.validation"] if "question" in row and "passage" in row else []
        )
        task_items.write_rows(tmp_path / f"{task}.{split}.jsonl", [*good, row])
        self.refuse(EvaluationError, says, llama, tasks=task, task_data=tmp_path)

    def test_damaged_data(self, llama, tmp_path):
        (tmp_path / "boolq.validation.jsonl").write_text("{")
        says = "data of task 'boolq' cannot be used"
        self.refuse(EvaluationError, says, llama, tasks="boolq", task_data=tmp_path)

    def test_hub_that_cannot_be_reached(self, llama):
        says = r"'aps/super_glue' on the hub.*boolq\.validation\.jsonl by --task-data"
        self.refuse(EvaluationError, says, llama, tasks="boolq")

    def test_tokenizer_of_a_larger_vocabulary(self, llama, data, tmp_path):
        letters = "".join(chr(0x430 + i) for i in range(40))
        row = {"passage": letters, "question": letters, "label": 0}
        task_items.write_rows(tmp_path / "boolq.validation.jsonl", [row])
        model = load_model(str(llama))
        self.refuse(
            ValueError, "puts out token 13.*vocabulary has 128", model,
            character_tokenizer(letters), tasks="boolq", task_data=tmp_path,
        )  # fmt: skip

    def test_model_in_memory_without_tokenizer(self, llama, data):
        model = load_model(str(llama))
        self.refuse(InvalidSettings, "needs its tokenizer", model, tasks="boolq", task_data=data)

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
            ({"model_type": "t5"}, "type 't5'"),
            ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
             "LlamaForSequenceClassification"),
        ],
    )  # fmt: skip
    def test_model_that_is_no_causal_language_model(self, tmp_path, config, says):
        (tmp_path / "config.json").write_text(json.dumps(config))
        self.refuse(
            UnsupportedModel, f"Expected a causal .*; got .*{says}", tmp_path, text="pydocs"
        )

    def test_nan(self, data, tokenizer):
        model = build("llama", torch.float32)
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
        says = "puts out NaN"
        self.refuse(NonFiniteError, says, model, tokenizer, tasks="boolq", task_data=data)

    def test_answer_longer_than_the_context(self, llama, tmp_path):
        row = {"goal": "x", "sol1": "y" * 100, "sol2": "z", "label": 0}
        task_items.write_rows(tmp_path / "piqa.validation.jsonl", [row])
        says = "answer of this task has 10. tokens, and the model reads at most 64"
        self.refuse(EvaluationError, says, llama, tasks="piqa", task_data=tmp_path)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"window": 65}, "at most 64 tokens; got 65"),
            ({"window": 8, "stride": 9}, "stride must be at most the window of 8"),
            ({"stride": 65}, "stride: the window has 64 tokens; got 65"),
            ({"batch_size": "many"}, "batch_size: .*got 'many'"),
            ({"limit": 0}, "limit: .*greater than 0"),
            ({"num_fewshot": 3}, "num_fewshot applies to tasks"),
            ({"num_fewshots": 3}, "no setting 'num_fewshots'. Did you mean 'num_fewshot'"),
            ({"device": "warp:1"}, "device: 'warp:1' is not available"),
        ],
    )
    def test_settings(self, llama, text_file, settings, says):
        self.refuse(InvalidSettings, says, llama, text=text_file, **settings)

    def test_lm_eval_missing(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "adapt_pruner.evaluation.harness")
        monkeypatch.delattr(measure.__spec__.loader and sys.modules["adapt_pruner.evaluation"],
                            "harness")  # fmt: skip
        for name in ("lm_eval", "lm_eval.tasks", "lm_eval.api", "lm_eval.api.task"):
            monkeypatch.setitem(sys.modules, name, None)
        says = r"pip install 'adapt-pruner\[eval\]'"
        self.refuse(MissingExtra, says, "demo", tasks="boolq")


class TestCommand:
    def test_table_and_json(self, cli, data, text_file, tmp_path, llama):
        file = tmp_path / "out.json"
        done = cli(
            "evaluate", "demo", llama, "--tasks", "boolq,wikitext", "--task-data", data,
            "--text", text_file, "--limit", 1, "--json", file,
        )  # fmt: skip
        assert (done.status, done.err) == (0, ""), done.err
        lines = [line.split() for line in done.out.splitlines()]
        assert lines[0][-2:] == ["demo", "llama"]
        assert lines[1] == ["parameters", "910,944", "110,336"]
        assert lines[2][:3] == ["boolq", "acc", "0"]
        text = " ".join(done.out.split())
        for part in ("only --limit 1", "tokenizers differ", "lm-eval 0.", "stride 512", "float32"):
            assert part in text
        models = json.loads(file.read_text())["models"]
        assert [m["model"] for m in models] == ["demo", str(llama)]
        assert models[0]["scores"][0]["name"] == "boolq"
        assert models[0]["records"][0]["key"]["task"] == "boolq"

    @pytest.mark.parametrize(
        ("arguments", "status", "says"),
        [
            ((), 2, "Name what to measure"),
            (("--suite", "knowlege"), 1, "Did you mean 'knowledge'"),
            (("--text", "no.txt"), 1, "no text file or directory 'no.txt'"),
            (("--tasks", "boolq", "--json", "/"), 1, "'/' is a directory"),
            (("--task", "boolq"), 2, "Did you mean '--tasks'"),
        ],
    )
    def test_one_message_and_a_status(self, cli, arguments, status, says):
        done = cli("evaluate", "demo", *arguments)
        assert done.status == status
        assert done.err.startswith("adapt-pruner: error: ")
        assert says in done.err
        assert done.err.count("\n") == 1

    def test_second_model_is_looked_at_before_the_first_is_measured(
        self, cli, own_results, text_file
    ):
        done = cli("evaluate", "demo", "./nowhere", "--text", text_file)
        assert "There is no model directory './nowhere'" in done.err
        assert not own_results.exists()

    def test_interruption_says_what_is_kept(self, cli, text_file, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(measure, "perplexity", interrupt)
        done = cli("evaluate", "demo", "--text", text_file)
        assert done.status == 130
        assert "the same command goes on from there" in done.err
