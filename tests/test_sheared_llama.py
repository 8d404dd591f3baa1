"""Sheared-LLaMA: formulas worked out anew, masks that reach their shape, a model cut as masked."""

from __future__ import annotations

import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from accel_runs import assert_equal, finish, in_child, kill_at, logged
from adapt_pruner import prune
from adapt_pruner.allocate import masks as masks_module
from adapt_pruner.allocate.masks import Masks, certain, gate, probability_above_zero
from adapt_pruner.errors import InvalidSettings, NonFiniteError, NotConverged
from adapt_pruner.goal import Goal
from adapt_pruner.methods import make_settings
from adapt_pruner.methods.shaped import shapes_for
from adapt_pruner.methods.sheared_llama import chosen_shape, make_masks
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import Cut
from adapt_pruner.plan import TRAINING, make_plan
from adapt_pruner.recovery import training
from adapt_pruner.recovery.accel import run_accel
from adapt_pruner.recovery.estimate import plan_accel
from adapt_pruner.recovery.request import AccelRequest
from adapt_pruner.recovery.settings import make_recovery_settings
from masking import mask
from picomodels import PICO, build, logits_of, random_tokens

TOKENS = random_tokens()
SHAPE = {"layers": 2, "hidden": 48, "neurons": 60, "kv-groups": 2, "query-heads": 1}


def shape_of(anatomy):
    kinds = {axis.kind for axis in anatomy.axes}
    return {kind: size for kind, size in SHAPE.items() if kind in kinds}


def random_masks(anatomy, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        masks = Masks(anatomy, shape_of(anatomy)).double()
        for log_alpha in masks.log_alpha.values():
            log_alpha.data.normal_(0, 1.5)
    return masks


# Formulas, from the paper's appendix and the concrete distribution's own definition.


def test_gates_are_those_of_the_paper():
    log_alpha, uniform = np.array([5.0, 0.3, -1.0, -3.0]), np.array([0.01, 0.5, 0.6, 0.99])
    expected = []
    for a, u in zip(log_alpha, uniform, strict=True):
        s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + a) / (2 / 3)))
        expected.append(min(1.0, max(0.0, s * (1.1 - -0.1) + -0.1)))
    found = gate(torch.tensor(log_alpha), torch.tensor(uniform))
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_mask_is_above_zero_as_often_as_its_probability_says():
    log_alpha = torch.tensor([-2.0, -0.5, 1.0], dtype=torch.float64)
    number = 200_000
    uniform = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    often = [(gate(a, uniform) > 0).double().mean().item() for a in log_alpha]
    assert probability_above_zero(log_alpha).tolist() == pytest.approx(often, abs=1e-5)


def test_certain_masks_are_those_of_the_published_code():
    log_alpha = torch.tensor([[4.0, -1.0, 2.0, 0.0]])
    expected = [1 / (1 + math.exp(-a / (2 / 3) * 0.8)) for a in (4.0, 2.0)]
    assert certain(log_alpha, 2).tolist()[0] == pytest.approx([expected[0], 0, expected[1], 0])


@pytest.mark.parametrize(("share", "ramped"), [(0.05, 0.25), (0.1, 0.5), (0.2, 1.0), (0.9, 1.0)])
def test_penalty_is_the_lagrangian(share, ramped):
    """Worked out row by row in numpy; the multipliers' own gradients are what they multiply."""
    masks = random_masks(find_anatomy(build("llama")))
    masks.share = share
    expected = 0.0
    for i, (kind, log_alpha) in enumerate(masks.log_alpha.items()):
        first, second = 0.7 + i, -0.4 * i
        masks.multipliers[kind].data = torch.tensor([first, second], dtype=torch.float64)
        rows = log_alpha.detach().numpy().clip(math.log(1e-2), math.log(1e2))
        asked = 1 - masks.sizes[kind] / rows.shape[1]
        off = []
        for row in rows:
            at_zero = [1 / (1 + math.exp(a - 2 / 3 * math.log(0.1 / 1.1))) for a in row]
            off.append(sum(at_zero) / len(row) - asked * ramped)
        expected += sum(first * x + second * x**2 for x in off) / len(off)
    assert masks.penalty().item() == pytest.approx(expected, rel=1e-9)
    masks.penalty().backward()
    found = masks.multipliers["hidden"].grad
    off = masks.removed()["hidden"][0] - 0.25 * ramped
    assert found.tolist() == pytest.approx([off.item(), off.item() ** 2])


def test_masks_reach_their_shape_and_are_cut_exactly_to_it():
    """On a loss that wants the first units of each row, by the trainer's own groups and rates."""
    anatomy = find_anatomy(build("llama", torch.float32))
    torch.manual_seed(0)
    masks = Masks(anatomy, SHAPE)
    optimizer = torch.optim.AdamW(masks.parameter_groups())
    steps = 800
    for step in range(steps):
        masks.share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = masks.rate
        masks.draw()
        wanted = sum(
            (value_U * torch.linspace(1, 0, len(value_U))).sum()
            for value_U in masks._current.values()
        )
        (masks.penalty() - 0.1 * wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
    for kind, (_, asked) in masks.removed().items():
        assert masks.masked()[kind] == pytest.approx(asked, abs=0.005), kind
    masks.check(steps)
    kept = {key: int((value_U > 0).sum()) for key, value_U in masks.final().items()}
    for (layer, kind), count in kept.items():
        if kind in ("hidden", "neurons", "kv-groups"):
            assert count == SHAPE[kind], (layer, kind)
    assert sum(count for (_, kind), count in kept.items() if kind == "layers") == SHAPE["layers"]
    first, last = (masks.final()[-1, "hidden"] > 0).split(32)
    assert first.sum() > 28 > 20 > last.sum()  # the loss wants the first ones more


# Masking is slicing.


@pytest.mark.parametrize("model_type", PICO)
def test_the_cut_model_computes_what_the_masked_one_does(model_type):
    """Norms over what is cut take their mean over what stays, in both."""
    model = build(model_type)
    masks = random_masks(find_anatomy(model)).eval()
    dense = logits_of(model, TOKENS)
    masks.attach(find_anatomy(model))
    masked = logits_of(model, TOKENS)
    masks.detach(model)
    assert torch.equal(logits_of(model, TOKENS), dense)
    keep = masks.fold(find_anatomy(model))
    Cut(keep).apply(model)
    torch.testing.assert_close(logits_of(model, TOKENS), masked, rtol=0, atol=5e-6)
    assert not torch.allclose(masked, dense, atol=0.1)


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "nemotron", "lfm2"])
def test_masks_of_zero_and_one_silence_units(model_type, monkeypatch):
    """Against masking that shares nothing with the library."""
    monkeypatch.setattr(masks_module, "AS_TRAINED", 1e4)  # of what stays, all
    model = build(model_type)
    masks = random_masks(find_anatomy(model)).eval()
    for log_alpha in masks.log_alpha.values():
        log_alpha.data.sub_(log_alpha.data.min() - 0.1)
    masks.attach(find_anatomy(model))
    masked = logits_of(model, TOKENS)
    keep = {key: value_U > 0 for key, value_U in masks.final().items()}
    silent = build(model_type)
    mask(silent, keep)
    torch.testing.assert_close(logits_of(silent, TOKENS), masked, rtol=0, atol=5e-6)


def test_random_masks_have_gradients_and_differ_from_pass_to_pass():
    model = build("qwen2", torch.float32)
    masks = random_masks(find_anatomy(model)).float()
    masks.attach(find_anatomy(model))
    masks.train()
    torch.manual_seed(0)  # else, one time in twenty, all of a few masks are clipped and have none
    one, other = (model(input_ids=TOKENS, use_cache=False).logits for _ in range(2))
    assert not torch.equal(one, other)
    one.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in masks.log_alpha.values())


# Shapes.


def test_the_shape_that_is_found_shrinks_all_widths_alike():
    anatomy = find_anatomy(build("llama"))
    settings = make_settings(method="sheared-llama")
    target = anatomy.total_parameters // 2
    shape = chosen_shape(shapes_for(settings, anatomy, target), target)
    shares = [shape["hidden"] / 64, shape["neurons"] / 96]
    shares.append(shape["kv-groups"] * shape["query-heads"] / 8)
    assert max(shares) - min(shares) < 0.15
    assert shape["layers"] >= 2


def test_a_whole_shape_is_a_target(calibration, monkeypatch):
    monkeypatch.setattr(masks_module, "TOLERANCE", 1.0)
    model = build("llama", torch.float32)
    result = prune(model, calibration=calibration, method="sheared-llama", steps=2, windows=2,
                   shape="hidden=48,layers=2,kv-heads=2,heads=4,intermediate=60")  # fmt: skip
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers) == (48, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.intermediate_size == 60
    assert result.after.total == result.target == model.num_parameters()


# Training that goes wrong.


def test_masks_that_are_not_there_are_not_cut(calibration):
    model = build("llama", torch.float32)
    count = model.num_parameters()
    with pytest.raises(NotConverged, match=r"after 2 steps 0\..% of the hidden are masked, and 25"):
        prune(model, calibration=calibration, method="sheared-llama", steps=2, windows=2,
              shape="hidden=48,intermediate=72")  # fmt: skip
    assert model.num_parameters() == count
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_that_is_not_finite_ends_the_training(calibration):
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.inf
    with pytest.raises(NonFiniteError, match=r"in step 1\. Lower --weight-learning-rate"):
        prune(model, calibration=calibration, sparsity=0.3, method="sheared-llama", steps=2)


# In accel.


@pytest.fixture
def sheared(request_: AccelRequest) -> AccelRequest:
    """60 steps of 4 windows, 40 of which train masks."""
    settings = make_settings(
        method="sheared-llama", calibration=request_.settings.calibration, window_length=12,
        windows=4, mask_share=2 / 3,
    )  # fmt: skip
    recovery = make_recovery_settings(
        sequence_length=16, batch_tokens=64, learning_rate=1e-3, repeat=True, alpha=0.0
    )
    return replace(
        request_, settings=settings, recovery=recovery, tokens=60 * 64, sparsity=0.4, save_steps=7
    )


@pytest.fixture
def any_masks(monkeypatch):
    """40 steps are too few to bring masks anywhere."""
    monkeypatch.setattr(masks_module, "TOLERANCE", 1.0)


def test_masks_then_the_cut_then_training(sheared, any_masks, tmp_path):
    result = finish(sheared, tmp_path / "run")
    assert result.after.total <= result.target < result.before.total
    assert [edit["edit"] for edit in result.record()["edits"]] == ["cut"]
    lines = logged(tmp_path / "run")
    masked = [line["masked/hidden"] for line in lines if "masked/hidden" in line]
    assert len(masked) == 40
    assert masked[-1] > 0.1 > masked[0]
    assert [line["phase"] for line in lines] == [1] * 40 + [2] * 20
    assert [phase["parameters"] for phase in result.training["phases"]] == [result.after.total] * 2


def test_domains_are_weighed_while_masks_train_and_after(sheared, any_masks, text_file, tmp_path):
    hard = tmp_path / "hard.txt"
    hard.write_text("\n<|endoftext|>\n".join(["qzxj kvw " * 40] * 30))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(
        "policy: dynamic\nreference_losses: {easy: 20, hard: 0.1}\nsources:\n"
        f"- {{name: easy, path: '{text_file}', weight: 1}}\n"
        f"- {{name: hard, path: '{hard}', weight: 1}}\n"
    )
    recovery = sheared.recovery.model_copy(update={"reweight_every": 2})
    finish(replace(sheared, data=str(mixture), recovery=recovery, tokens=9 * 64), tmp_path / "run")
    lines = logged(tmp_path / "run")
    assert [line["phase"] for line in lines] == [1] * 6 + [2] * 3
    shares = [line["weight/hard"] for line in lines]
    assert 0.5 == shares[0] < shares[5] <= shares[8]


def test_a_plan_counts_the_training(sheared):
    """Of prune: gradients and moments, and time for every step. Of accel: the whole model first."""
    anatomy, goal = find_anatomy(build("llama", torch.float32)), Goal(sparsity=0.4)
    few, many = (
        make_plan(anatomy.model, make_settings(method="sheared-llama", steps=steps), goal)
        for steps in (10, 1000)
    )
    assert many.seconds > 20 * few.seconds
    assert few.memory_bytes[TRAINING] == 3 * 4 * anatomy.total_parameters
    plan = plan_accel(sheared)
    first, second = plan.phases
    per_token = [phase.flops / phase.tokens for phase in (first, second)]
    assert per_token[0] / per_token[1] == pytest.approx(plan.before.total / plan.target, rel=0.01)


@pytest.mark.parametrize("step", [25, 41])
def test_killed_while_masks_train_it_goes_on_to_the_same_weights(
    sheared, any_masks, tmp_path, step
):
    sheared = replace(sheared, tokens=45 * 64)
    if not (tmp_path.parent / "whole").exists():
        finish(sheared, tmp_path.parent / "whole")

    def die():
        kill_at(training.PhaseTraining, "step", step, before_it=True)
        run_accel(sheared, tmp_path / "killed")

    assert in_child(die) == signal.SIGKILL
    finish(sheared, tmp_path / "killed")
    assert_equal(tmp_path / "killed", tmp_path.parent / "whole")


def test_masks_that_are_not_there_end_a_run_before_the_cut(sheared, tmp_path):
    with pytest.raises(NotConverged, match="larger --mask-share"):
        run_accel(replace(sheared, tokens=8 * 64), tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"phases": 3}, "phases: sheared-llama has two phases of its own"),
        ({"lora_rank": 2}, "lora_rank: sheared-llama trains all weights"),
        ({"sharding": "fsdp2"}, "trains masks with --sharding ddp; got fsdp2"),
    ],
)
def test_what_does_not_go_with_masks(sheared, tmp_path, changes, match):
    values = {**sheared.recovery.model_dump(exclude_unset=True), **changes}
    with pytest.raises(InvalidSettings, match=match):
        run_accel(replace(sheared, recovery=make_recovery_settings(**values)), tmp_path / "run")


def test_make_masks_of_a_model_that_loses_nothing_of_a_kind():
    masks = make_masks(
        find_anatomy(build("llama")),
        make_settings(method="sheared-llama", shape="hidden=48,layers=3,heads=8"),
        int(find_anatomy(build("llama")).total_parameters * 0.7),
    )  # fmt: skip
    assert set(masks.sizes) == {"hidden", "neurons"}
