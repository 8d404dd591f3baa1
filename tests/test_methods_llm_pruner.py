"""LLM-Pruner, beside a slow and direct transcription of its paper and published code.

The transcription shares nothing with the library: dense gradients by autograd, window by window.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapt_pruner import CalibrationData, prune
from adapt_pruner.errors import InvalidSettings, InvalidTarget
from picomodels import build, random_tokens

LAYERS, HEADS, KV, WIDTH, HEAD = 4, 4, 2, 24, 8
SIZES = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
         "intermediate_size": WIDTH, "attention_bias": False, "mlp_bias": False}  # fmt: skip
ENDS = {"protect_first": 1, "protect_last": 1}
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")


@pytest.fixture
def model():
    return build("llama", **SIZES)


@pytest.fixture(scope="module")
def windows():
    return CalibrationData(random_tokens(12, 20), window_length=10, num_windows=5, redraw=False)


def gradients(model, tokens_BT):
    """Per matrix: the gradient of the mean loss of the batch, and the mean of squares of the
    gradients of single windows."""
    first, second = {}, {}
    parameters = dict(model.named_parameters())
    for tokens_1T in tokens_BT.split(1):
        logits = model(input_ids=tokens_1T, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1], tokens_1T[0, 1:])
        of_window = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, of_window, strict=True):
            first[name] = first.get(name, 0) + gradient / len(tokens_BT)
            second[name] = second.get(name, 0) + gradient**2 / len(tokens_BT)
    return first, second


def published_scores(model, tokens_BT, order, granularity):
    """Layer -> scores of its KV groups, and of its neurons."""
    first, second = gradients(model, tokens_BT)
    scores = []
    for i in range(LAYERS):
        channels = {"self_attn.q_proj": [], "kv": [], "mlp": []}
        for path in MATRICES:
            name = f"model.layers.{i}.{path}.weight"
            weight = model.get_parameter(name).detach()
            salience = {
                "first": weight * first[name],
                "second": weight * second[name] * weight,
                "mixed": weight * first[name] - 0.5 * weight * second[name] * weight,
            }[order]
            side = 0 if path in OUTPUTS else 1
            is_vector = granularity == "vector"
            along = salience.sum(side).abs() if is_vector else salience.abs().sum(side)
            kind = "mlp" if "mlp" in path else "kv" if path[-6] in "kv" else "self_attn.q_proj"
            channels[kind].append(along)
        of_heads = torch.stack(channels["self_attn.q_proj"]).sum(0).view(HEADS, HEAD).sum(1)
        of_kv = torch.stack(channels["kv"]).sum(0).view(KV, HEAD).sum(1)
        groups = of_kv + of_heads.view(KV, HEADS // KV).sum(1)  # heads 0 and 1 read KV head 0
        scores.append((groups, torch.stack(channels["mlp"]).sum(0)))
    return scores


def keep_best(scores, count):
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def local_choice(scores, ratio):
    """Of W neurons int(W (1 - p)) stay; a head goes when a whole one fits into the share."""
    kept = []
    for i, (groups, neurons) in enumerate(scores):
        share = ratio if 0 < i < LAYERS - 1 else 0
        channels = KV * HEAD - int(KV * HEAD * (1 - share))
        kept.append((keep_best(groups, KV - channels // HEAD),
                     keep_best(neurons, int(WIDTH * (1 - share)))))  # fmt: skip
    return kept


def global_choice(scores, count):
    """The `count` lowest scores of all units of the inner layers go, whatever they cost."""
    inner = range(1, LAYERS - 1)
    pool = torch.cat([torch.cat(scores[i]) for i in inner])
    threshold = pool.sort().values[count - 1]
    every = torch.arange(WIDTH)
    kept = [(torch.arange(KV), every) for _ in scores]
    for i in inner:
        kept[i] = tuple((of > threshold).nonzero().flatten() for of in scores[i])
    return kept


def channels_of(units, size):
    return (units[:, None] * size + torch.arange(size)).flatten()


def sliced(model, kept):
    """The matrices that are left, by name."""
    left = {}
    for i, (groups, neurons) in enumerate(kept):
        rows = {
            "q": channels_of(groups, HEADS // KV * HEAD),
            "k": channels_of(groups, HEAD),
            "v": channels_of(groups, HEAD),
        }
        for path in MATRICES:
            name = f"model.layers.{i}.{path}.weight"
            weight = model.get_parameter(name).detach().clone()
            chosen = neurons if "mlp" in path else rows.get(path[-6], rows["q"])
            left[name] = weight[:, chosen] if path in OUTPUTS else weight[chosen]
    return left


def check(model, kept, windows, **settings):
    left = sliced(model, kept)
    outside = sum(p.numel() for n, p in model.named_parameters() if n not in left)
    size = outside + sum(weight.numel() for weight in left.values())
    prune(model, params=size, calibration=windows, method="llm-pruner", **{**ENDS, **settings})
    assert model.num_parameters() == size
    for name, weight in left.items():
        assert torch.equal(model.get_parameter(name), weight), name


@pytest.mark.parametrize("granularity", ["element", "vector"])
@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_a_local_cut_is_the_published_one(model, windows, order, granularity):
    scores = published_scores(model, windows.draw(), order, granularity)
    kept = local_choice(scores, ratio=0.55)
    assert [len(groups) for groups, _ in kept] == [2, 1, 1, 2]
    check(model, kept, windows, order=order, granularity=granularity)


def test_a_head_stays_where_no_whole_one_fits(model, windows):
    kept = local_choice(published_scores(model, windows.draw(), "first", "element"), ratio=0.4)
    assert [len(groups) for groups, _ in kept] == [2, 2, 2, 2]
    check(model, kept, windows)


@pytest.mark.parametrize("order", ["first", "mixed"])
def test_a_global_cut_takes_the_lowest_scores_whatever_they_cost(model, windows, order):
    with torch.no_grad():  # attention of layer 1 does next to nothing
        model.model.layers[1].self_attn.o_proj.weight[:, : HEADS // KV * HEAD] *= 1e-3
        model.model.layers[1].self_attn.v_proj.weight[:HEAD] *= 1e-3
        model.model.layers[1].self_attn.q_proj.weight[: HEADS // KV * HEAD] *= 1e-3
        model.model.layers[1].self_attn.k_proj.weight[:HEAD] *= 1e-3
    scores = published_scores(model, windows.draw(), order, "element")
    kept = global_choice(scores, count=15)
    assert len(kept[1][0]) == 1
    check(model, kept, windows, order=order, ranking="global")


def test_each_step_of_an_iterative_run_scores_the_model_as_it_is(model, windows):
    """Steps of equal size, by hand and in one run."""
    by_hand = build("llama", **SIZES)
    total = model.num_parameters()
    for share in (0.9, 0.8):
        prune(by_hand, params=int(total * share), calibration=windows, method="llm-pruner",
              ranking="global", **ENDS)  # fmt: skip
    result = prune(model, params=int(total * 0.8), calibration=windows, method="llm-pruner",
                   ranking="global", iterative_steps=2, **ENDS)  # fmt: skip
    assert len(result.steps) == 2
    for mine, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_the_ends_are_shares_of_the_depth(windows):
    """4 and 2 of 32 layers are published: 1 and 1 of 9 stay whole."""
    model = build("llama", **{**SIZES, "num_hidden_layers": 9})
    result = prune(model, sparsity=0.2, calibration=windows, method="llm-pruner")
    whole = [i for i, (a, b) in enumerate(zip(result.widths_before, result.widths_after,
                                              strict=True)) if a == b]  # fmt: skip
    assert whole == [0, 8]


def test_official_kv_scores_add_the_heads_that_the_published_code_adds(model, windows):
    """It folds the scores of 4 heads onto 2 groups by view(2, 2).sum(0): heads 0 and 2, 1 and 3."""
    from adapt_pruner.methods.adapt_pruner import with_official_heads
    from adapt_pruner.model.anatomy import find_anatomy

    axis = find_anatomy(model).of_kinds({"kv-groups"})[0]
    query = with_official_heads(axis).slots[0].index_UK.view(KV, HEADS // KV, HEAD)
    assert query[:, :, 0].tolist() == [[0, 2 * HEAD], [HEAD, 3 * HEAD]]
    result = prune(model, sparsity=0.3, calibration=windows, method="llm-pruner",
                   kv_scores="official", **ENDS)  # fmt: skip
    assert result.after.total <= result.target


@pytest.mark.parametrize(
    ("error", "settings", "message"),
    [
        (InvalidSettings, {"protect_first": 2, "protect_last": 2}, "none of the model's 4 layers"),
        (InvalidSettings, {"protect_first": 1, "layout": "uniform"}, "must be 0; got 1 and 0"),
        (InvalidSettings, {"steps": 3}, "'steps' is a setting of adapt-pruner"),
        (InvalidSettings, {"order": "third"}, "order: Input should be 'first', 'second'"),
        (InvalidSettings, {"cut": ("layers",)}, "llm-pruner cuts hidden, kv-groups"),
        (InvalidTarget, {"protect_first": 2, "protect_last": 1}, "below what is possible"),
    ],
)
def test_bad_settings(model, windows, error, settings, message):
    with pytest.raises(error, match=message):
        prune(model, sparsity=0.6, calibration=windows, method="llm-pruner", **settings)
