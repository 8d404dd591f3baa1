"""Targets that are no parameters: bytes of a GGUF file, and of KV cache per token."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accel_runs import finish
from adapt_pruner import CalibrationData, export_gguf, prune
from adapt_pruner.allocate.chains import _ascending, _worthwhile
from adapt_pruner.cli.parameters import Bytes
from adapt_pruner.errors import InvalidSettings, InvalidTarget
from adapt_pruner.evaluation.bench import _kv_bytes_per_token
from adapt_pruner.export.quantise import FILE_TYPES
from adapt_pruner.export.size import RESERVE, FileBytes
from adapt_pruner.goal import Goal
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.axes import SUBLAYERS
from adapt_pruner.model.edits import Cut
from adapt_pruner.model.resources import CacheBytes
from command_line import TINY
from gguf_models import BARE, VOCABULARY, byte_tokenizer
from picomodels import build, random_tokens
from test_counting import random_keep, sizes_of
from toy_anatomy import ToyAnatomy, mlp

TOKENIZER = byte_tokenizer()
KINDS = {"neurons", "kv-groups", "query-heads", "layers"}
CALIBRATION = CalibrationData(random_tokens(20, 30), window_length=12, num_windows=4)
NEURON = 3 * 64 + 2  # parameters of one neuron of the tiny llama, biases included


def small(model_type="llama", **more):
    return build(model_type, torch.float32, vocab_size=VOCABULARY, **more)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directory of a tiny Llama whose tokenizer GGUF can express. Not to be written to."""
    directory = tmp_path_factory.mktemp("models") / "small"
    small(**BARE).save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


def written(model, quantize, tmp_path):
    file = tmp_path / "model.gguf"
    return export_gguf(model, file, quantize, tokenizer=TOKENIZER, overwrite=True).num_bytes


@given(
    st.sampled_from([("llama", KINDS | {*SUBLAYERS}), ("qwen3", KINDS), ("gemma", {"layers"})]),
    st.sampled_from(list(FILE_TYPES)),
    st.integers(0, 2**31),
)
@example(("qwen3", KINDS), "Q8_0", 98)  # 71 and 77 neurons are 96 in the file: equal layers
@settings(max_examples=20, deadline=None)
def test_bytes_of_any_mix_are_those_of_the_file(tmp_path_factory, model, quantize, seed):
    model_type, kinds = model
    tied = {"tie_word_embeddings": True} if model_type == "qwen3" else {}
    dense = small(model_type, attention_bias=False, **tied)
    anatomy = find_anatomy(dense, FileBytes(quantize, TOKENIZER))
    keep = random_keep(anatomy, seed, kinds, probability=0.8)
    counted = anatomy.cost.total(sizes_of(anatomy, keep))
    Cut(keep).apply(dense)
    spare = counted - written(dense, quantize, tmp_path_factory.mktemp("files"))
    assert RESERVE - 64 <= spare <= RESERVE + 250  # of the per-layer arrays, and to whole blocks


def test_a_file_by_hand():
    # Q8_0 holds 32 values in 34 bytes. Of 96 neurons 33 take the bytes of 64: 32 are gone, and with
    # them 32 rows of 64 values in two matrices, and 32 values of 64 rows in one.
    anatomy = find_anatomy(small(**BARE), FileBytes("Q8_0", TOKENIZER))
    total = anatomy.cost.total
    saved = 2 * 32 * 2 * 34 + 64 * 34
    assert total({}) - total({(0, "neurons"): 64}) == saved
    assert total({(0, "neurons"): 33}) == total({(0, "neurons"): 64})
    assert total({(0, "neurons"): 32}) == total({}) - 2 * saved
    # F16 has no blocks, and 32 bytes are the smallest step: a row of 64 values has 128.
    anatomy = find_anatomy(small(**BARE), FileBytes("F16", TOKENIZER))
    assert anatomy.amount - anatomy.cost.total({(0, "neurons"): 95}) == 3 * 128


class Stairs(ToyAnatomy):
    """Neurons cost in blocks of 4, but whole blocks of 8 are cheaper by half."""

    def touching(self, keys, sizes):
        blocks = -(-sizes[keys[0]] // 4) * 4
        return torch.where(blocks % 8 == 0, blocks, 2 * blocks)


def test_sizes_that_save_nothing_are_left_out():
    # 16 neurons cost 16, 15 to 13 as much, 12 cost 24, 8 cost 8, and so do 4; 7 to 5 cost 8, too.
    sizes, costs = _worthwhile(
        [mlp(0, 16)], torch.ones(15, dtype=torch.int64), Stairs([mlp(0, 16)])
    )
    assert (sizes.tolist(), costs.tolist()) == ([8], [8])


@pytest.mark.parametrize(
    ("importance", "costs", "density"),
    [
        ([1, 2, 3], [1, 1, 1], [1, 2, 3]),
        ([2, 1, 6], [1, 2, 1], [1, 1, 6]),  # 2 for 1 would come after 1 for 2
        ([3, 1, 1], [1, 1, 3], [1, 1, 1]),
        ([], [], []),
    ],
)
def test_what_leaves_later_has_at_least_as_much_for_its_cost(importance, costs, density):
    made = _ascending(torch.tensor(importance, dtype=torch.float64), torch.tensor(costs))
    assert made.tolist() == density


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 9)), min_size=1, max_size=20))
def test_pools_ascend_and_keep_the_whole(blocks):
    importance, costs = (torch.tensor(v, dtype=torch.float64) for v in zip(*blocks, strict=True))
    density = _ascending(importance, costs)
    assert (density.diff() >= 0).all()
    assert float((density * costs).sum()) == pytest.approx(float(importance.sum()), abs=1e-9)


@pytest.mark.parametrize(
    ("values", "quantize", "share"),
    [
        ({}, "Q8_0", 0.8),
        ({}, "F16", 0.7),
        ({}, "Q4_K_M", 0.85),
        ({"layout": "uniform"}, "Q8_0", 0.75),
        ({"method": "magnitude"}, "Q4_0", 0.8),
        ({"method": "llm-pruner", "protect_first": 0, "protect_last": 0}, "Q8_0", 0.8),
        (
            {"method": "minitron", "cut": ("neurons", "hidden"), "max_width_pruning": 0.9},
            "F16",
            0.8,
        ),
        ({"method": "depth"}, "F16", 0.75),
        ({"method": "flap", "compensation": "none"}, "Q8_0", 0.8),
        ({"cut": ("neurons", "kv-groups", "query-heads", "layers")}, "Q8_0", 0.7),
        ({"cut": ("neurons", "hidden")}, "Q8_0", 0.8),
    ],
)
def test_the_file_has_the_bytes_asked_for(values, quantize, share, tmp_path):
    model = small(**BARE)
    dense = written(model, quantize, tmp_path)
    target = round(share * dense)
    quick = {} if "method" in values else {"steps": 2, "tuning_steps": 1}
    result = prune(model, TOKENIZER, bytes=target, quantize=quantize, calibration=CALIBRATION,
                   **quick, **values)  # fmt: skip
    found = written(result, quantize, tmp_path)
    assert found <= result.reached <= target
    assert result.reached - found <= RESERVE + 250
    if values.get("method") != "depth":
        block = 6_600 if quantize != "F16" else 3 * 128 * 3  # one of neurons, in every layer
        assert target - result.reached < block * (3 if "layout" in values else 1)


def test_more_is_kept_than_by_the_same_share_of_parameters(tmp_path):
    """Bytes are what is asked for, so that nothing is cut that would save none."""
    model = small(**BARE)
    anatomy = find_anatomy(model, FileBytes("Q8_0", TOKENIZER))
    target = anatomy.amount - 7_000
    result = prune(model, TOKENIZER, bytes=target, quantize="Q8_0", calibration=CALIBRATION,
                   steps=2, tuning_steps=1)  # fmt: skip
    widths = [layer["intermediate_size"] for layer in result.widths_after]
    assert all(width % 32 == 0 for width in widths)


class TestCache:
    def test_is_that_of_the_model(self):
        model = build("qwen2", torch.bfloat16, use_sliding_window=False, layer_types=None)
        assert find_anatomy(model, CacheBytes()).amount == _kv_bytes_per_token(model)
        result = prune(model, kv_bytes=200, calibration=CALIBRATION, steps=2, tuning_steps=1)
        # A group of a layer takes a key and a value of 8 numbers, 2 bytes each. Six of 12 stay.
        assert result.reached == _kv_bytes_per_token(result.model) == 192
        assert {layer["intermediate_size"] for layer in result.widths_after} == {96}

    def test_is_refused_where_no_kv_head_can_go(self):
        with pytest.raises(InvalidTarget, match="KV heads of this model cannot be cut"):
            prune(build("gpt_neox"), kv_bytes=100, calibration=CALIBRATION)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"bytes": 10**5, "params": 10**5}, InvalidTarget, "Give the target once: .* params and b"),
        ({"sparsity": 0.1, "quantize": "Q8_0"}, InvalidSettings, "got Q8_0 without bytes"),
        ({"bytes": 10**5, "quantize": "Q8"}, InvalidSettings, "Did you mean 'Q8_0'"),
        ({"bytes": 10**9}, InvalidTarget, r"1,000,000,000 bytes of a F16 file is above the mod"),
        ({"bytes": 9_000}, InvalidTarget, "9,000 bytes of a F16 file is below what is possible"),
        ({"bytes": 10**5, "method": "slicegpt"}, InvalidTarget, "slicegpt cannot be aimed at byt"),
        ({"bytes": 10**5, "method": "flap"}, InvalidTarget, "FLAP, which adds .* --compensation n"),
        ({"kv_bytes": 10}, InvalidTarget, "10 bytes of KV cache per token is below what is poss"),
    ],
)
def test_what_cannot_be_is_refused(values, kind, message):
    with pytest.raises(kind, match=message):
        prune(small(**BARE), TOKENIZER, calibration=CALIBRATION, **values)


def test_bytes_need_a_tokenizer():
    with pytest.raises(InvalidSettings, match="pass `tokenizer`"):
        Goal(bytes=10**6).resource()


@pytest.mark.parametrize(
    ("text", "count"),
    [("80MB", 80_000_000), ("1.5 GB", 1_500_000_000), ("20kB", 20_000), ("64MiB", 64 * 2**20),
     ("123456", 123_456), ("500B", 500), ("1,000", 1000)],
)  # fmt: skip
def test_bytes_as_people_write_them(text, count):
    assert Bytes().convert(text, None, None) == count


class TestCommand:
    def test_a_file_of_the_bytes_asked_for(self, cli, checkpoint, text_file, tmp_path):
        file = tmp_path / "small.gguf"
        done = cli(
            "prune", checkpoint, "-o", file, "--bytes", "110kB", "--quantize", "q8_0", *TINY,
            "--calibration", text_file,
        )  # fmt: skip
        assert (done.status, done.err) == (0, "")
        assert 100_000 < file.stat().st_size <= 110_000
        assert "target 110,000 bytes of a Q8_0 file, met with" in done.out

    def test_a_checkpoint_from_which_the_file_is_made(self, cli, checkpoint, text_file, tmp_path):
        directory = tmp_path / "small"
        done = cli(
            "prune", checkpoint, "-o", directory, "--bytes", "110kB", "--quantize", "Q8_0", *TINY,
            "--calibration", text_file,
        )  # fmt: skip
        assert (done.status, done.err) == (0, "")
        done = cli("export", directory, "-o", tmp_path / "a.gguf", "--quantize", "Q8_0")
        assert done.status == 0
        assert (tmp_path / "a.gguf").stat().st_size <= 110_000
        recipe = yaml.safe_load((directory / "recipe.yaml").read_text())
        assert (recipe["bytes"], recipe["quantize"]) == (110_000, "Q8_0")
        assert "The target was 110,000 bytes of a Q8_0 file, met with" in (
            directory / "report.html"
        ).read_text("utf-8")
        again = tmp_path / "again"
        done = cli("prune", "--recipe", directory / "recipe.yaml", "-o", again)
        assert (done.status, done.err) == (0, "")
        weights = (p / "model.safetensors" for p in (directory, again))
        assert len({file.read_bytes() for file in weights}) == 1

    def test_the_plan_counts_in_bytes(self, cli, checkpoint):
        done = cli("prune", checkpoint, "--bytes", "110kB,105kB", "--quantize", "Q8_0", "--dry-run")
        dense = find_anatomy(small(**BARE), FileBytes("Q8_0", TOKENIZER)).amount
        assert f"of {dense:,} bytes of a Q8_0 file → at most 110,000" in done.out
        assert "105,000" in done.out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--bytes", "0"), "expected bytes such as 80MB"),
            (("--bytes", "80XB"), "expected bytes such as 80MB"),
            (("--bytes", "100kB", "--sparsity", "0.2"), "Give the target once"),
            (("--sparsity", "0.2", "--quantize", "Q8_0"), "or give --bytes"),
            (("--bytes", "100kB", "--quantize", "Q9"), "there is no 'Q9'"),
        ],
    )
    def test_refusals(self, cli, checkpoint, text_file, tmp_path, options, message):
        done = cli("prune", checkpoint, "-o", tmp_path / "no", "--calibration", text_file, *options)
        assert done.status != 0
        assert message in done.err
        assert not (tmp_path / "no").exists()


def test_accel_cuts_to_bytes(request_, checkpoint, tmp_path):
    target = 110_000
    goal = {"model": str(checkpoint), "sparsity": None, "bytes": target, "quantize": "Q8_0"}
    changed = type(request_)(**{**vars(request_), **goal})
    result = finish(changed, tmp_path / "run")
    exported = export_gguf(tmp_path / "run", tmp_path / "a.gguf", "Q8_0")
    assert exported.num_bytes <= result.reached <= target
    assert math.isclose(exported.num_bytes, result.reached, abs_tol=RESERVE + 250)
