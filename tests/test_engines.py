"""The commands that model cards and reports give for each engine, and `adapt-pruner with`."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adapt_pruner import prune
from adapt_pruner.cli.with_command import resolve
from adapt_pruner.errors import AdaptPrunerError
from adapt_pruner.export.engines import limits, servings
from adapt_pruner.markup import fenced, markdown
from adapt_pruner.report import pictures, write_page
from adapt_pruner.report.card import model_card
from adapt_pruner.report.record import read_run
from picomodels import build

EVIL = "x'; touch pwned #<img src=x onerror=alert(1)> `id` ```$(id)\n# [a](b)"
EQUAL = {
    "model_type": "llama", "hidden_size": 256, "num_attention_heads": 8, "head_dim": 32,
    "intermediate_size": 512,
}  # fmt: skip
DIFFERENT = {**EQUAL, "per_layer_config": {"0": {"intermediate_size": 352}, "1": {}}}


def by_engine(config, directory="smaller"):
    return {one.engine: one for one in servings(directory, config)}


class TestEngines:
    def test_layers_that_differ(self):
        found = by_engine(DIFFERENT)
        assert found["transformers"].command == "adapt-pruner with transformers serve smaller"
        assert found["vLLM"].command == "vllm serve smaller --model-impl transformers"
        assert "--trust-remote-code" not in found["vLLM"].note
        assert found["llama.cpp"].command.splitlines()[0] == (
            "adapt-pruner export smaller -o model.gguf"
        )
        for engine in ("SGLang", "TensorRT-LLM", "MLX", "ONNX Runtime GenAI"):
            assert found[engine].command == ""
            assert "--layout uniform" in found[engine].note

    def test_equal_layers(self):
        found = by_engine(EQUAL)
        assert found["transformers"].command == "transformers serve smaller"
        assert found["vLLM"].command == "vllm serve smaller"
        for engine in ("SGLang", "TensorRT-LLM", "MLX", "ONNX Runtime GenAI"):
            assert "smaller" in found[engine].command
            assert found[engine].note == ("" if engine == "MLX" else "Not tried.")
        assert by_engine({**EQUAL, "model_type": "phi"})["MLX"].note == "Not tried."

    def test_portable(self):
        config = {**DIFFERENT, "auto_map": {"AutoModel": "modeling_pruned.LlamaModel"}}
        assert "--trust-remote-code" in by_engine(config)["vLLM"].note

    def test_heads_too_small_for_vllm(self):
        said = by_engine({**DIFFERENT, "head_dim": 8})["vLLM"]
        assert (said.command, said.note) == ("", "Its kernels refuse heads of 8 entries.")

    def test_layers_without_attention(self):
        skipping = {**EQUAL, "per_layer_config": {"0": {"skip": ["self_attn"]}, "1": {}}}
        assert by_engine(skipping)["vLLM"].command == ""
        assert "attention in every layer" in by_engine(skipping)["vLLM"].note
        skipping = {**EQUAL, "per_layer_config": {"0": {"skip": ["mlp"]}, "1": {}}}
        assert by_engine(skipping)["vLLM"].command

    def test_types_that_were_not_tried_say_so(self):
        assert "Not tried" not in by_engine(DIFFERENT)["vLLM"].note
        assert (
            "Not tried with models of type lfm2"
            in by_engine({**DIFFERENT, "model_type": "lfm2"})["vLLM"].note
        )

    @pytest.mark.parametrize(
        ("model_type", "named"),
        [("qwen2", "Qwen2"), ("granite", "Granite"), ("cohere2", "Cohere"), ("llama", "")],
    )
    def test_classes_that_derive_the_head_size(self, model_type, named):
        config = {**EQUAL, "model_type": model_type, "num_attention_heads": 6}
        said = by_engine(config)["vLLM"]
        assert said.command.endswith("--model-impl transformers") == bool(named)
        assert named in said.note
        assert any(named in sentence for sentence in limits(config)) == bool(named)
        assert limits({**config, "num_attention_heads": 8}) == []

    def test_widths_for_groups_of_32(self):
        config = {**EQUAL, "per_layer_config": {"0": {"intermediate_size": 351}, "1": {}}}
        (sentence,) = limits(config)
        assert "no multiples of 32: 351." in sentence
        assert limits(DIFFERENT) == []
        many = {str(i): {"intermediate_size": 33 + i} for i in range(9)}
        assert "33, 34, 35, 36, ..." in limits({**EQUAL, "per_layer_config": many})[0]

    @pytest.mark.parametrize("config", [EQUAL, DIFFERENT])
    @pytest.mark.parametrize("name", [EVIL, "-rf", "a b"])
    def test_names_reach_the_shell_as_one_word(self, config, name):
        for one in servings(name, config):
            for line in [one.command] if name == EVIL else one.command.splitlines():
                words = shlex.split(line)
                assert not {"touch", "b", "-rf"} & set(words)

    def test_odd_configurations(self):
        assert len(servings("x", {})) == len(servings("x", EQUAL))
        assert limits({"hidden_size": "x", "num_attention_heads": 0, "head_dim": None}) == []


@pytest.fixture(scope="module")
def cards(calibration, tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("cards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_all", lambda directory, result: {})
        for name, layout, portable in (
            ("plain", "per-layer", False),
            ("portable", "per-layer", True),
            ("uniform", "uniform", False),
        ):
            model = build("llama", torch.float32)
            result = prune(
                model, calibration=calibration, sparsity=0.3, steps=2, tuning_steps=1, layout=layout
            )
            result.save(home / name, portable=portable)
    return {
        **{d.name: (d / "README.md").read_text(encoding="utf-8") for d in home.iterdir()},
        "evil": model_card(read_run(home / "plain", EVIL), {}),
    }


class TestCard:
    def test_uniform_run_names_no_extreme(self, cards):
        assert "All 3 layers gave up the same." in cards["uniform"]
        assert "gave up the most" not in cards["uniform"]
        assert "gave up the most" in cards["plain"]

    def test_says_how_to_load_and_serve(self, cards):
        assert "adapt-pruner with transformers serve plain" in cards["plain"]
        assert "put `adapt-pruner with` before their command" in cards["plain"]
        assert "trust_remote_code=True" not in cards["plain"]
        assert "pass `trust_remote_code=True`" in cards["portable"]
        assert "modeling_pruned.py" in cards["portable"]
        assert "adapt-pruner with" not in cards["uniform"]
        assert "**SGLang**: Reads one width for all layers" in cards["plain"]
        assert "**SGLang**: Not tried." in cards["uniform"]

    def test_names_are_escaped_and_quoted(self, cards):
        outside, inside = _apart(cards["evil"])
        assert "<img" not in outside
        assert "[a](b)" not in outside
        assert r"\[a\](b)" in outside
        assert f"from_pretrained({EVIL!r})" in inside
        assert f"adapt-pruner with transformers serve {shlex.quote(EVIL)}" in inside

    def test_page_quotes_as_well(self, cards, calibration, tmp_path, monkeypatch):
        monkeypatch.setattr(pictures, "draw_all", lambda directory, result: {})
        prune(
            build("llama", torch.float32),
            calibration=calibration,
            sparsity=0.2,
            steps=1,
            tuning_steps=1,
        ).save(tmp_path / "a b")
        write_page(tmp_path / "a b")
        page = (tmp_path / "a b" / "report.html").read_text(encoding="utf-8")
        assert "-o &#39;a b&#39;" in page
        assert "transformers serve &#39;a b&#39;" in page
        assert "<code>adapt-pruner with</code>" in page


def _apart(card: str) -> tuple[str, str]:
    """What stands outside and inside of blocks of code."""
    fence, outside, inside = "", [], []
    for line in card.splitlines():
        mark = re.match(r"`{3,}", line)
        if not fence and mark:
            fence = mark.group()
        elif fence and line == fence:
            fence = ""
        else:
            (inside if fence else outside).append(line)
    assert not fence
    return "\n".join(outside), "\n".join(inside)


def test_markdown_and_fences():
    assert markdown("# *a* ~b~\n|") == r"\# \*a\* \~b\~ \|"
    assert fenced("a ```` b").startswith("`````\n")


class TestWith:
    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "adapt_pruner", "with", *arguments],
            capture_output=True, text=True, env={**os.environ, **environment}, check=False,
        )  # fmt: skip

    def test_program_and_its_children_import_the_package(self, tmp_path):
        (tmp_path / "sitecustomize.py").write_text("print('own')\n")
        script = tmp_path / "train.py"
        script.write_text(
            "import subprocess, sys\n"
            "print('adapt_pruner' in sys.modules, sys.argv[1:], flush=True)\n"
            "if 'child' not in sys.argv:\n"
            "    subprocess.run([sys.executable, __file__, 'child'], check=True)\n"
            "    sys.exit(7)\n"
        )
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = self.run(str(script), "--debug", "-h", PYTHONPATH=path)
        assert done.stdout.split("\n") == [
            "own", "own", "True ['--debug', '-h']", "own", "True ['child']", "",
        ]  # fmt: skip
        assert done.returncode == 7

    def test_python_without_the_package(self, tmp_path):
        """`-S` leaves site-packages out as another environment does, and starts nothing itself."""
        startup = Path(sys.modules["adapt_pruner"].__file__ or "").parent / "startup"
        code = (
            "import os, sys; sys.modules['adapt_pruner'] = None\n"
            "os.environ['ADAPT_PRUNER_WITH'] = str(os.getpid())\n"
            f"sys.path.insert(0, {str(startup)!r})\n"
            "sys.modules.pop('sitecustomize', None); import sitecustomize; print('not reached')\n"
        )
        done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
        assert done.returncode == 1
        assert "cannot import adapt_pruner" in done.stderr
        assert f"Install the package there: {sys.executable} -m pip install" in done.stderr
        assert done.stdout == ""

    def test_resolve(self, tmp_path):
        script = tmp_path / "a.py"
        script.write_text("")
        assert resolve(["-m", "json.tool", "-h"]) == [sys.executable, "-m", "json.tool", "-h"]
        assert resolve([str(script), "x"]) == [sys.executable, str(script), "x"]
        assert Path(resolve(["python", "-V"])[0]).is_file()

    @pytest.mark.parametrize(
        ("program", "says"),
        [
            (["no-such-program"], "no program 'no-such-program' on the PATH"),
            (["absent.py"], "there is no script 'absent.py'"),
            (["-m"], "-m needs the name of a module"),
            (["--foo", "x"], "got '--foo'. Options of the program stand after its name"),
            ([""], "no program ''"),
        ],
    )
    def test_what_cannot_be_run(self, cli, program, says):
        with pytest.raises(AdaptPrunerError, match=re.escape(says)):
            resolve(program)
        done = cli("with", *program)
        assert done.status == 1
        assert says in done.err

    def test_debug_is_taken_from_before_it_alone(self, cli):
        assert cli("with").status == 2
        assert "Missing argument" in cli("with").err
