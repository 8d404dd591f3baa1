"""SliceGPT: the formulas written down a second time, identities, and checkpoints that load."""

from __future__ import annotations

import pytest
import torch

from adapt_pruner.errors import (
    NonFiniteError,
)
from adapt_pruner.methods import slicegpt
from adapt_pruner.methods.base import Work
from adapt_pruner.methods.slicegpt import SliceGPTSettings
from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.rotation import Rotate, parameters_after
from picomodels import build, logits_of
from sliced import FORMS, ROTATABLE, TOKENS

# Norms, rotary embeddings and eager softmax compute in float32 even in a float64 model.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def rotate(model, calibration, width, shared=False):
    settings = SliceGPTSettings(window_length=12, shared_rotation=shared)
    work = Work(model, calibration, (0,), settings)
    find = slicegpt._shared_basis if shared else slicegpt._bases
    bases = find(work, find_anatomy(model), calibration.draw(0), width)
    Rotate(width, shared, bases).apply(model)
    return bases


# --- the formulas, a second time --------------------------------------------------------------


def principal(signals, width):
    """Eigenvectors of sum X^T X + 0.01 mean diag, those of the largest eigenvalues first."""
    gram = sum(x.T @ x for x in signals)
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    values, vectors = torch.linalg.eigh(gram)
    return vectors[:, values.argsort(descending=True)][:, :width]


def rms(x, width, eps):
    return x / (x.pow(2).sum(-1, keepdim=True) / width + eps).sqrt()


def rope(x_HTh, theta=10_000.0):
    half = x_HTh.shape[-1] // 2
    places = torch.arange(x_HTh.shape[1], dtype=torch.float64)
    angles = places[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x_HTh[..., :half], x_HTh[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(x, w):
    """Causal attention of 8 query heads on 4 KV heads of size 8, one window at a time."""
    length = len(x)
    query, key, value = (
        (x @ w[name].T + w[f"{name}.bias"]).view(length, -1, 8).transpose(0, 1) for name in "qkv"
    )
    query, key = rope(query), rope(key)
    key, value = key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    scores = query @ key.transpose(1, 2) / 8**0.5
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1).reshape(length, -1) @ w["o"].T + w["o.bias"]


def feed(x, w):
    gate, up = x @ w["gate"].T + w["gate.bias"], x @ w["up"].T + w["up.bias"]
    return (gate * gate.sigmoid() * up) @ w["down"].T + w["down.bias"]


def slicegpt_by_hand(model, windows, width):
    """Cut as published: rotate and slice weights layer by layer, run the sliced layers on. Returns
    a function from tokens to logits."""
    eps, whole = model.config.rms_norm_eps, model.config.hidden_size
    embeddings = model.model.embed_tokens.weight.detach().clone()
    layers = []
    for layer in model.model.layers:
        w = {}
        for names, parent in (("qkvo", layer.self_attn), (("gate", "up", "down"), layer.mlp)):
            for name in names:
                linear = getattr(parent, f"{name}_proj")
                w[name], w[f"{name}.bias"] = linear.weight.detach(), linear.bias.detach()
        for name in "qkv":
            w[name] = w[name] * layer.input_layernorm.weight.detach()
        for name in ("gate", "up"):
            w[name] = w[name] * layer.post_attention_layernorm.weight.detach()
        layers.append(w)
    head = model.lm_head.weight.detach() * model.model.norm.weight.detach()
    signals = [embeddings[window] for window in windows]
    q_0 = principal(signals, whole)
    embeddings = (embeddings @ q_0)[:, :width]
    signals = [(x @ q_0)[:, :width] for x in signals]
    for i, w in enumerate(layers):
        for name in "qkv":
            w[name] = (w[name] @ q_0)[:, :width]
        shortcut = q_0.T[:width]
        middles = [x @ shortcut + attend(rms(x, whole, eps), w) for x in signals]
        q_1 = principal(middles, whole)
        w["attention shortcut"] = (shortcut @ q_1)[:, :width]
        w["o"], w["o.bias"] = (q_1.T @ w["o"])[:width], (q_1.T @ w["o.bias"])[:width]
        for name in ("gate", "up"):
            w[name] = (w[name] @ q_1)[:, :width]
        middles = [x @ w["attention shortcut"] + attend(rms(x, whole, eps), w) for x in signals]
        shortcut = q_1.T[:width]
        ends = [x @ shortcut + feed(rms(x, whole, eps), w) for x in middles]
        q_0 = principal(ends, whole)
        left = whole if i == len(layers) - 1 else width
        w["mlp shortcut"] = (shortcut @ q_0)[:, :left]
        w["down"], w["down.bias"] = (q_0.T @ w["down"])[:left], (q_0.T @ w["down.bias"])[:left]
        signals = [(x @ q_0)[:, :left] for x in ends]
    head = head @ q_0

    def run(window):
        x = embeddings[window]
        for w in layers:
            x = x @ w["attention shortcut"] + attend(rms(x, whole, eps), w)
            x = x @ w["mlp shortcut"] + feed(rms(x, whole, eps), w)
        return rms(x, whole, eps) @ head.T

    return run, layers


@pytest.mark.parametrize("width", [40, 56])
def test_the_published_method_written_a_second_time_gives_the_same_model(calibration, width):
    model = build("llama")
    run, layers = slicegpt_by_hand(model, calibration.draw(0), width)
    rotate(model, calibration, width)
    expected = torch.stack([run(window) for window in TOKENS])
    torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=1e-3, atol=1e-4)
    for layer, w in zip(model.model.layers, layers, strict=True):
        # Eigenvectors have no sign.
        assert layer.attn_shortcut_Q.shape == w["attention shortcut"].shape
        assert layer.mlp_shortcut_Q.shape == w["mlp shortcut"].shape
        torch.testing.assert_close(
            layer.attn_shortcut_Q.abs(), w["attention shortcut"].abs(), rtol=1e-2, atol=1e-3
        )


# --- identities -------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", FORMS)
@pytest.mark.parametrize("model_type", ROTATABLE)
def test_a_rotation_that_cuts_nothing_changes_nothing(model_type, shared, calibration):
    model = build(model_type)
    before = logits_of(model, TOKENS)
    expected = parameters_after(find_anatomy(model), 64, shared)
    rotate(model, calibration, 64, shared)
    assert model.num_parameters() == expected
    torch.testing.assert_close(logits_of(model, TOKENS), before, **CLOSE)
    if not shared:
        for layer in model.model.layers:
            for matrix in (layer.attn_shortcut_Q, layer.mlp_shortcut_Q):
                identity = torch.eye(64, dtype=matrix.dtype)
                torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shared", FORMS)
def test_half_precision_keeps_the_identity(shared, calibration):
    """Matrices are computed in float64 and rounded once or twice at the end."""
    exact, model = build("llama"), build("llama", torch.bfloat16)
    before = logits_of(exact, TOKENS)
    rounded = (logits_of(model, TOKENS).double() - before).abs().mean()
    rotate(model, calibration, 64, shared)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    lost = (logits_of(model, TOKENS).double() - before).abs().mean()
    assert lost < 3 * rounded


def test_a_basis_that_is_not_orthonormal_is_refused():
    model = build("llama")
    before = logits_of(model, TOKENS)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0))).Q
    with pytest.raises(NonFiniteError, match=r"off orthonormality by 0\.0"):
        Rotate(64, True, [basis.to(torch.bfloat16)]).apply(model)
    assert torch.equal(logits_of(model, TOKENS), before)


@pytest.mark.parametrize("shared", FORMS)
def test_dimensions_that_the_stream_never_uses_cost_nothing(shared, calibration):
    """Everything that writes to the stream lies in 40 of its 64 dimensions."""
    model = build("llama")
    span = torch.linalg.qr(torch.randn(64, 40, generator=torch.Generator().manual_seed(1))).Q
    projection = (span @ span.T).double()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding @ projection)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(projection @ linear.weight)
                linear.bias.copy_(projection @ linear.bias)
    before = logits_of(model, TOKENS)
    rotate(model, calibration, 40, shared)
    torch.testing.assert_close(logits_of(model, TOKENS), before, rtol=1e-3, atol=1e-4)
