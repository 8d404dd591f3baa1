"""Statistics of earlier steps that count in later ones."""

from __future__ import annotations

import pytest
import torch

from adapt_pruner.model.anatomy import find_anatomy
from adapt_pruner.model.edits import Cut
from adapt_pruner.score.collect import collect
from adapt_pruner.score.observers import Gram, UnitGradients
from picomodels import build, random_tokens

WINDOWS = random_tokens(batch=6)


def tables(statistics):
    return statistics[Gram].matrix, statistics[UnitGradients].squared


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_two_passes_are_one_over_all_windows(share):
    model = build("llama")
    anatomy, watching = find_anatomy(model), [Gram(carries=True), UnitGradients()]
    with collect(model, anatomy, WINDOWS[:2], watching):
        for observer in watching:
            observer.carry({}, share)
    with collect(model, anatomy, WINDOWS[2:], watching) as both:
        found = tables(both)
    later = [Gram(), UnitGradients()]
    with collect(model, anatomy, WINDOWS[:2], [Gram(), UnitGradients()]) as first:
        before = tables(first)
    with collect(model, anatomy, WINDOWS[2:], later) as second:
        after = tables(second)
    for key, matrix_CC in found[0].items():
        expected_CC = after[0][key] + share * before[0][key]
        torch.testing.assert_close(matrix_CC, expected_CC, rtol=1e-5, atol=1e-4)
    for key, squared_U in found[1].items():
        expected_U = (4 * after[1][key] + 2 * share * before[1][key]) / (4 + 2 * share)
        torch.testing.assert_close(squared_U, expected_U, rtol=1e-4, atol=1e-9)


def test_what_is_cut_is_forgotten():
    model = build("llama")
    anatomy, watching = find_anatomy(model), [Gram(carries=True), UnitGradients()]
    axis = next(axis for axis in anatomy.axes if axis.kind == "neurons")
    keep = {axis.key: torch.arange(axis.num_units) % 3 > 0}
    with collect(model, anatomy, WINDOWS, watching) as first:
        whole_CC = first[Gram].matrix[axis.projection].clone()
        for observer in watching:
            observer.carry(keep, 1.0)
    Cut(keep).apply(model)
    anatomy = find_anatomy(model)
    with collect(model, anatomy, WINDOWS, watching) as second:
        found_CC = second[Gram].matrix[axis.projection]
    kept = keep[axis.key]
    assert axis.layer == 0  # nothing below changed: the neurons that stay do what they did
    torch.testing.assert_close(found_CC, 2 * whole_CC[kept][:, kept], rtol=1e-5, atol=1e-4)


def test_nothing_is_carried_where_nothing_shall_be():
    model = build("llama")
    anatomy, watching = find_anatomy(model), [Gram(carries=True), UnitGradients()]
    with collect(model, anatomy, WINDOWS, watching) as first:
        alone = {key: matrix.clone() for key, matrix in first[Gram].matrix.items()}
        for observer in watching:
            observer.carry(None, 1.0)
    with collect(model, anatomy, WINDOWS, watching) as second:
        for key, matrix_CC in second[Gram].matrix.items():
            torch.testing.assert_close(matrix_CC, alone[key])
