"""What holds for every method of the table, whichever it is."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapt_pruner import CalibrationData, prune, replay
from adapt_pruner.allocate import masks
from adapt_pruner.errors import AdaptPrunerError
from adapt_pruner.methods import METHODS
from adapt_pruner.model.anatomy import find_anatomy
from picomodels import PICO, build, logits_of, random_tokens

TOKENS = random_tokens()
QUICK = {"windows": 4, "window_length": 10, "steps": 2, "tuning_steps": 1}
"""Settings that make a run short, where a method has them."""
BY_RUN = {METHODS[name].run: name for name in reversed(list(METHODS))}
"""One method of each algorithm: the baselines are settings of the first."""
WIDTHS = [
    name
    for name, row in METHODS.items()
    if row.settings.model_fields["cut"].default == ("neurons", "kv-groups")
    and name not in ("magnitude", "random")
]


def quick(name, **settings):
    fields = METHODS[name].settings.model_fields
    return {k: v for k, v in {**QUICK, **settings}.items() if k in fields}


@pytest.fixture(autouse=True)
def _masks_may_be_anywhere(monkeypatch):
    """Two steps bring them nowhere."""
    monkeypatch.setattr(masks, "TOLERANCE", 1.0)


@pytest.fixture(scope="module")
def windows():
    return CalibrationData(random_tokens(20, 24), window_length=10, num_windows=4)


CANNOT = {
    "slicegpt": {
        "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "gpt_neox", "lfm2",
        "nemotron", "olmo", "olmo2", "olmo3", "phi", "starcoder2",
    },
}  # fmt: skip
"""Method -> architectures that it refuses, in one sentence."""
IN_WEIGHTS = ("slicegpt",)
"""Methods whose record does not say all that they did to the structure."""
CASES = [
    *((name, model_type) for name in BY_RUN.values() for model_type in PICO),
    *((name, "llama") for name in METHODS if name not in BY_RUN.values()),
]


@pytest.mark.parametrize(("name", "model_type"), CASES)
def test_prune_save_load_generate(name, model_type, windows, tmp_path):
    """Or one sentence on why this architecture cannot be pruned so."""
    model = build(model_type, torch.float32)
    original = find_anatomy(model).total_parameters
    try:
        result = prune(model, sparsity=0.4, calibration=windows, method=name, **quick(name))
    except AdaptPrunerError:
        assert find_anatomy(model).total_parameters == original
        assert model_type in CANNOT.get(name, ())
        return
    assert model.num_parameters() == result.after.total <= result.target < original
    if name not in IN_WEIGHTS:
        again = build(model_type, torch.float32)
        replay(again, result.record())
        assert again.config.to_dict() == model.config.to_dict()
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    pruned = logits_of(model, TOKENS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, TOKENS), pruned)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0,
               "attention_mask": torch.ones_like(TOKENS)}  # fmt: skip
    cached = loaded.generate(TOKENS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **options))


@pytest.mark.parametrize("name", METHODS)
def test_a_target_that_is_met_already_changes_nothing(name, windows):
    model = build("llama", torch.float32)
    before = logits_of(model, TOKENS)
    result = prune(model, sparsity=0.0, calibration=windows, method=name, **quick(name))
    assert result.after == result.before
    assert result.edits == []
    assert torch.equal(logits_of(model, TOKENS), before)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_model(name, windows):
    models = [build("llama", torch.float32) for _ in range(2)]
    for model in models:
        prune(model, sparsity=0.4, calibration=windows, method=name, **quick(name))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_unit_that_gives_nothing_goes_first(name, windows):
    """Neuron 5 of each layer and the value head of KV group 1 are silent, whatever the text."""
    model = build("llama", attention_bias=False, mlp_bias=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[5] = 0
            layer.self_attn.v_proj.weight.unflatten(0, (4, 8))[1] = 0
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                linear.weight.unflatten(0, (4, -1))[1] = 0
    for cut, unit in (("neurons", 5), ("kv-groups", 1)):
        some = build("llama", attention_bias=False, mlp_bias=False)
        some.load_state_dict(model.state_dict())
        result = prune(some, sparsity=0.12, calibration=windows, method=name, cut=(cut,),
                       **quick(name))  # fmt: skip
        of_cut = [units for (_, kind), units in result.kept.items() if kind == cut]
        assert of_cut
        assert all(unit not in units for units in of_cut)
