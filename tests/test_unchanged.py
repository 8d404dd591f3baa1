"""The presets leave the embedded model as they left it when `unchanged.json` was recorded."""

from __future__ import annotations

import json

import pytest

from unchanged import CASES, RECORD, SEEDS, fingerprint, outcome, share_of_units_kept_alike

ALIKE = 0.98
"""Share of the units that must be the same on other processors, where rounding differs."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES)
def test_presets_give_the_model_that_they_gave(case, seed, shared_cache):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    expected, found = record["cases"][case][str(seed)], outcome(case, seed)
    remedy = "If that is meant, write the record anew: python tests/unchanged.py"
    assert share_of_units_kept_alike(expected["kept"], found["kept"]) >= ALIKE, remedy
    if fingerprint() == record["made on"]:
        assert found == expected, remedy


def test_units_are_compared_axis_by_axis():
    assert share_of_units_kept_alike({"0/neurons": "f"}, {"0/neurons": "7"}) == 3 / 4
    assert share_of_units_kept_alike({"0/neurons": "f"}, {"1/neurons": "f"}) == 0
