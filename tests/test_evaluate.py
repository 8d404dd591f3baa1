"""Evaluation: lm-eval's figures to the last digit, kept, and never a wrong one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import task_items
from adapt_pruner import evaluate, load_model, load_tokenizer, perplexity, prune
from adapt_pruner.errors import (
    EvaluationError,
)
from adapt_pruner.evaluation import Evaluation, EvaluationListener, subject
from adapt_pruner.evaluation.store import ResultStore
from adapt_pruner.evaluation.suites import SUITES
from adapt_pruner.model.loading import resolve_name
from adapt_pruner.settings import EvaluationSettings
from conftest import character_tokenizer

pytestmark = pytest.mark.usefixtures("own_results")
harness = pytest.importorskip("adapt_pruner.evaluation.harness")

COMMONSENSE = [task for b in SUITES["commonsense"].benchmarks for task in b.tasks]
TASKS = [*COMMONSENSE, "wikitext"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, text_file):
    """The embedded model with a third of it gone, in memory and in a directory."""
    model, tokenizer = load_model("demo"), load_tokenizer("demo")
    result = prune(
        model,
        tokenizer,
        sparsity=0.3,
        calibration=text_file,
        windows=4,
        window_length=16,
        steps=1,
        tuning_steps=1,
    )
    return result, result.save(tmp_path_factory.mktemp("pruned") / "smaller")


def definitions(data: Path, output: Path) -> Path:
    """What lm-eval's command line needs to run the same tasks on the same files."""
    output.mkdir()
    rows = [harness.WantedRow(task, (task,)) for task in TASKS]
    harness.write_local_tasks(rows, [data], output, EvaluationSettings())
    return output


def lm_eval_command(model: str, data: Path, place: Path) -> dict[str, dict[str, Any]]:
    """Metrics per task as lm-eval's own command line writes them."""
    arguments = [
        "run", "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", ",".join(TASKS),
        "--include_path", definitions(data, place / "definitions"), "--device", "cpu",
        "--output_path", place / "out.json",
    ]  # fmt: skip
    script = Path(__file__).with_name("lm_eval_command.py")
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = place.glob("out*.json")
    return json.loads(file.read_text())["results"]


def figures(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if "," in k}


def measured(found: Evaluation) -> dict[str, dict[str, Any]]:
    return {r.key["task"]: figures(r.result["metrics"]) for r in found.records}


class TestEqualToLmEval:
    @pytest.mark.slow
    def test_dense_model_to_the_last_digit(self, data, tmp_path):
        own = measured(evaluate("demo", tasks=TASKS, task_data=data))
        theirs = lm_eval_command(resolve_name("demo"), data, tmp_path)
        assert own.keys() == set(TASKS)
        assert own == {task: figures(theirs[task]) for task in TASKS}

    @pytest.mark.slow
    def test_pruned_model_in_memory_from_its_directory_and_by_lm_eval(self, pruned, data, tmp_path):
        result, directory = pruned
        in_memory = evaluate(
            result.model, result.tokenizer, tasks=TASKS, task_data=data,
            store=ResultStore(tmp_path / "one"),
        )  # fmt: skip
        from_directory = evaluate(
            directory, tasks=TASKS, task_data=data, store=ResultStore(tmp_path / "other")
        )
        assert from_directory.num_cached == 0
        assert measured(in_memory) == measured(from_directory)
        theirs = lm_eval_command(str(directory), data, tmp_path)
        assert measured(in_memory) == {task: figures(theirs[task]) for task in TASKS}

    def test_group_is_the_mean_over_all_items(self, llama, tmp_path):
        sets = ("aqua-rat", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "sat-en", "sat-math",
                "sat-en-without-passage")  # fmt: skip
        for number, name in enumerate(sets):
            rows = [{"query": f"{n} or {number}?", "choices": ["(A)x", "(B)yy"], "gold": [n % 2]}
                    for n in range(1 + number % 3)]  # fmt: skip
            task_items.write_rows(tmp_path / f"agieval_{name}.test.jsonl", rows)
        found = evaluate(llama, tasks="agieval_nous", task_data=tmp_path)
        right = sum(r.result["metrics"]["acc_norm,none"] * r.result["num_samples"]
                    for r in found.records)  # fmt: skip
        score = found.score("agieval_nous", "acc_norm")
        assert len(found.records) == 8
        assert score.num_samples == 15
        assert score.value == pytest.approx(right / 15)

    def test_one_file_may_hold_all_subjects_and_shots_have_their_own(self, tmp_path):
        subjects = ["abstract_algebra", "anatomy"]
        rows = [{**task_items.MMLU, "subject": s} for s in subjects for _ in range(2)]
        for split in ("dev", "test"):
            task_items.write_rows(tmp_path / f"mmlu.{split}.jsonl", rows)
        names = [f"mmlu_{subject}" for subject in subjects]
        found = evaluate("demo", tasks=names, task_data=tmp_path, num_fewshot=1)
        assert [record.key["num_fewshot"] for record in found.records] == [1, 1]
        assert [record.result["num_samples"] for record in found.records] == [2, 2]
        (tmp_path / "mmlu.dev.jsonl").unlink()
        assert evaluate("demo", tasks=names, task_data=tmp_path).scores
        with pytest.raises(EvaluationError, match=r"no 'mmlu_abstract_algebra\.dev\.jsonl'"):
            evaluate("demo", tasks=names, task_data=tmp_path, num_fewshot=1)


class TestSuites:
    def test_metrics_and_shots_of_table_6(self):
        found = {
            b.name: (b.metric.split(",")[0], b.num_fewshot)
            for suite in SUITES.values()
            for b in suite.benchmarks
        }
        normalised, plain = ("acc_norm", 0), ("acc", 0)
        assert found == {
            "ARC-e": normalised, "ARC-c": normalised, "BoolQ": plain, "HellaSwag": normalised,
            "OBQA": normalised, "PIQA": normalised, "SIQA": plain, "WinoGrande": plain,
            "WikiText2": ("word_perplexity", 0), "PTB": ("word_perplexity", 0),
            "BBH": ("exact_match", 3), "TruthfulQA": ("acc", 1), "AGIEval": normalised,
            "MMLU": ("acc", 5),
        }  # fmt: skip

    def test_averages_are_those_of_the_papers(self, data):
        found = evaluate("demo", suite="commonsense", task_data=data)
        value = {score.name: score.value for score in found.scores}
        first = ("ARC-e", "ARC-c", "HellaSwag", "OBQA", "PIQA", "SIQA", "WinoGrande")
        second = ("ARC-e", "ARC-c", "BoolQ", "HellaSwag", "OBQA", "PIQA", "WinoGrande")
        for label, names in (("average, Adapt-Pruner", first), ("average, AdaPruner", second)):
            assert value[label] == pytest.approx(sum(value[name] for name in names) / 7)
        errors = [found.score(name).stderr for name in first]
        together = math.sqrt(sum(error**2 for error in errors)) / 7  # type: ignore[operator]
        assert found.score("average, Adapt-Pruner").stderr == pytest.approx(together)
        assert together > 0
        assert found.score("ARC-e").metric == "acc_norm"
        assert found.score("BoolQ").metric == "acc"

    def test_truthfulqa_has_one_shot_although_lm_eval_says_none(self, tmp_path):
        targets = {"choices": ["Yes.", "No."], "labels": [1, 0]}
        rows = [{"question": f"Is {n} one?", "mc1_targets": targets, "mc2_targets": targets}
                for n in range(3)]  # fmt: skip
        task_items.write_rows(tmp_path / "truthfulqa_mc.validation.jsonl", rows)
        (benchmark,) = (b for b in SUITES["knowledge"].benchmarks if b.name == "TruthfulQA")
        row = harness.WantedRow.of_suite(benchmark)
        with harness.load_tasks([row], [tmp_path], EvaluationSettings()) as (loaded,):
            task = loaded.tasks["truthfulqa_mc1"]
            task.build_all_requests(limit=1, rank=0, world_size=1)
            context = task.instances[0].args[0]
        assert task.get_config("num_fewshot") == 1
        assert context.count("Is ") == 2  # the shot and the question itself

    def test_every_task_of_the_suites_is_known_to_lm_eval_where_it_is_looked_for(self):
        rows = [harness.WantedRow.of_suite(b) for s in SUITES.values() for b in s.benchmarks]
        manager = harness._manager(rows)
        assert len(manager.all_tasks) < 200  # not all of lm-eval
        leaves = {b.name: len(list(harness._leaves(manager, b.tasks[0])))
                  for s in SUITES.values() for b in s.benchmarks}  # fmt: skip
        assert (leaves["MMLU"], leaves["BBH"], leaves["AGIEval"]) == (57, 27, 8)


class TestCache:
    def test_nothing_is_computed_twice_and_no_weights_are_read(self, data, text_file, monkeypatch):
        tasks = "boolq,winogrande,wikitext"
        first = evaluate("demo", tasks=tasks, task_data=data, text=text_file, limit=1)

        def refuse(*args, **kwargs):
            raise AssertionError("weights are read")

        monkeypatch.setattr(subject, "load_model", refuse)
        again = evaluate("demo", tasks=tasks, task_data=data, text=text_file, limit=1)
        assert (first.num_cached, again.num_cached) == (0, 4)
        assert again.scores == first.scores
        assert again.parameters == first.parameters == 910_944

    def test_directory_shares_the_results_of_the_model_in_memory(self, pruned, data):
        result, directory = pruned
        first = evaluate(result.model, result.tokenizer, tasks="piqa", task_data=data)
        again = evaluate(directory, tasks="piqa", task_data=data)
        assert (first.num_cached, again.num_cached) == (0, 1)
        assert again.scores == first.scores

    @pytest.mark.parametrize(
        "change", [{"limit": 1}, {"seed": 1}, {"max_length": 32}, {"batch_size": "2"},
                   {"dtype": "float64"}],
    )  # fmt: skip
    def test_settings_belong_to_the_key(self, llama, data, change):
        evaluate(llama, tasks="boolq", task_data=data)
        assert evaluate(llama, tasks="boolq", task_data=data, **change).num_cached == 0

    def test_weights_data_and_tokenizer_belong_to_the_key(self, llama, data, tmp_path):
        model = tmp_path / "model"
        shutil.copytree(llama, model)

        def cached() -> int:
            return evaluate(model, tasks="boolq", task_data=tmp_path / "data").num_cached

        shutil.copytree(data, tmp_path / "data")
        assert (cached(), cached()) == (0, 1)
        weights = load_file(model / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        assert (cached(), cached()) == (0, 1)
        rows = task_items.ITEMS["boolq.validation"]
        task_items.write_rows(tmp_path / "data" / "boolq.validation.jsonl", rows[::-1])
        assert (cached(), cached()) == (0, 1)
        character_tokenizer("äö").save_pretrained(model)
        assert (cached(), cached()) == (0, 1)

    def test_definition_of_the_task_belongs_to_the_key(self, data):
        row = harness.WantedRow("boolq", ("boolq",))
        with harness.load_tasks([row], [data], EvaluationSettings()) as (loaded,):
            (task,) = loaded.tasks.values()
            before = harness.definition_of(task)
            assert before == harness.definition_of(task)
            task.set_config("doc_to_text", "{{question}}")
            assert before != harness.definition_of(task)

    def test_text_depends_on_window_and_stride(self, llama, text_file):
        def cached(**settings: Any) -> int:
            return evaluate(llama, text=text_file, **settings).num_cached

        assert [cached(), cached(), cached(window=32), cached(window=32, stride=16)] == [0, 1, 0, 0]

    def test_interrupted_run_goes_on_where_it_was(self, llama, data):
        class Stop(EvaluationListener):
            def on_task(self, name: str, number: int, count: int) -> None:
                if number == 2:
                    raise KeyboardInterrupt

        tasks = ["boolq", "piqa", "social_iqa"]
        with pytest.raises(KeyboardInterrupt):
            evaluate(llama, tasks=tasks, task_data=data, listener=Stop())
        assert evaluate(llama, tasks=tasks, task_data=data).num_cached == 2

    def test_result_that_cannot_be_kept_is_still_returned(self, llama, data, tmp_path):
        (tmp_path / "file").write_text("")
        heard = []

        class Notice(EvaluationListener):
            def on_notice(self, message: str) -> None:
                heard.append(message)

        store = ResultStore(tmp_path / "file" / "below")
        found = evaluate(llama, tasks="boolq", task_data=data, store=store, listener=Notice())
        assert found.score("boolq").num_samples == 2
        assert "could not be written" in heard[0]

    def test_record_holds_all_that_is_needed_to_measure_again(self, data, text_file):
        found = evaluate("demo", tasks="boolq", task_data=data, text=text_file, window=64)
        benchmark, text = found.records
        assert {"task", "num_fewshot", "limit", "seed", "data", "model", "dtype", "versions"} <= (
            benchmark.key.keys()
        )
        assert {"torch", "transformers", "lm-eval", "adapt-pruner"} <= (
            benchmark.key["versions"].keys()
        )
        assert benchmark.result["data"]["source"] == ["boolq.validation.jsonl"]
        assert (text.key["window"], text.key["stride"]) == (64, 64)
        assert benchmark.result["max_length"] == 512


class TestText:
    def test_overlapping_windows_score_every_token_once(self, llama, tokenizer, documents):
        model, text = load_model(str(llama)), documents[0]
        found = perplexity(model, tokenizer, [text], window=20, stride=5)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        length = ids.shape[1]
        losses = []
        for position in range(1, length):
            # The first window that reaches a token scores it.
            start = 0 if position < 20 else 5 * math.ceil((position - 19) / 5)
            with torch.no_grad():
                logits = model(ids[:, start:position]).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[ids[0, position]].item())
        assert found.num_tokens == length - 1
        assert math.log(found.perplexity) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        bits = sum(losses) / math.log(2) / len(text.encode())
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)

    def test_stride_of_the_window_is_no_overlap(self, llama, tokenizer, documents):
        model = load_model(str(llama))
        plain = perplexity(model, tokenizer, documents, window=24)
        assert perplexity(model, tokenizer, documents, window=24, stride=24) == plain

    def test_scores(self, llama, text_file):
        found = evaluate(llama, text=text_file, window=32)
        tokens, bits = found.scores
        assert (tokens.metric, bits.metric) == ("token_perplexity", "bits_per_byte")
        assert tokens.name == "text.txt"
        # One token per character here, so both say the same.
        assert not tokens.higher_is_better
        assert 0 < bits.stderr < bits.value  # type: ignore[operator]

    @pytest.mark.parametrize(("limit", "count"), [(None, 40), (1, 1), (3, 3), (0.1, 4), (99, 40)])
    def test_limit_counts_documents(self, llama, text_file, limit, count):
        found = evaluate(llama, text=text_file, limit=limit)
        assert found.records[0].result["num_documents"] == count


class TestModelIsLeftAsItWas:
    def test_mode_and_tokenizer(self, llama, tokenizer, data):
        model = load_model(str(llama)).train()
        before = tokenizer.pad_token
        evaluate(model, tokenizer, tasks="boolq", task_data=data)
        assert model.training
        assert tokenizer.pad_token == before
