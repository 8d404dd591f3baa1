"""The head in chunks of tokens against the whole logits, in every architecture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.score import head as head_module
from adapt_pruner.score.collect import Pass, collect
from adapt_pruner.score.head import cross_entropy, hidden_states, plain_head, through_head
from adapt_pruner.score.observers import UnitGradients
from picomodels import PICO, build, random_tokens

WINDOWS = random_tokens(batch=5, length=12)


@pytest.mark.parametrize("model_type", PICO)
def test_gradient_to_the_hidden_states_is_that_of_the_whole_logits(model_type, monkeypatch):
    monkeypatch.setattr(head_module, "TOKENS", 7)  # chunks end inside windows
    model = build(model_type).eval()
    head = plain_head(model)
    if head is None:
        pytest.skip("this architecture works on its logits after the head")
    hidden_BTD = hidden_states(model, WINDOWS).detach().requires_grad_()
    logits_BTV = head(hidden_BTD)
    torch.testing.assert_close(logits_BTV, model(input_ids=WINDOWS).logits)
    each = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
    (each * len(WINDOWS)).backward()
    expected_BTD, hidden_BTD.grad = hidden_BTD.grad, None

    total, gradient_BTD = through_head(head, hidden_BTD, cross_entropy(WINDOWS))

    assert float(total) == pytest.approx(each.item() * len(WINDOWS), rel=1e-5)
    torch.testing.assert_close(gradient_BTD, expected_BTD, rtol=1e-4, atol=1e-6)
    assert hidden_BTD.grad is None


def test_logits_that_are_changed_after_the_head_are_taken_whole():
    plain = build("gemma2", final_logit_softcapping=None)
    capped = build("gemma2", final_logit_softcapping=2.0)
    assert plain_head(plain) is plain.get_output_embeddings()
    assert plain_head(capped) is None
    with collect(capped, find_anatomy(capped), WINDOWS, [UnitGradients()]) as statistics:
        logits_BTV = capped(input_ids=WINDOWS).logits
        loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
        assert statistics.loss == pytest.approx(float(loss), rel=1e-5)


def test_no_more_logits_than_of_a_chunk_are_there_at_once(monkeypatch):
    monkeypatch.setattr(head_module, "TOKENS", 16)
    model = build("llama")
    seen = []

    class Counting(nn.Linear):
        def forward(self, input):
            seen.append(input.shape[:-1].numel())
            return super().forward(input)

    model.get_output_embeddings().__class__ = Counting
    with collect(model, find_anatomy(model), WINDOWS, [UnitGradients()], how=Pass(5)):
        pass
    assert max(seen) == 16
    assert sum(seen) >= WINDOWS.numel()
