"""What pyproject.toml asks for: lower bounds, each said once, that the tested versions satisfy."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def tested() -> dict[str, Version]:
    """The versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def asked(project: dict) -> list[tuple[str, Requirement]]:
    groups = {"dependencies": project["dependencies"], **project["optional-dependencies"]}
    return [(group, Requirement(line)) for group, lines in groups.items() for line in lines]


def lower(specifier: SpecifierSet) -> Version | None:
    bounds = [Version(s.version) for s in specifier if s.operator in (">=", "==", "~=")]
    return max(bounds) if bounds else None


def test_every_dependency_has_a_lower_bound_that_is_tested_above(project, tested):
    for group, requirement in asked(project):
        name = canonicalize_name(requirement.name)
        if name == canonicalize_name(project["name"]):  # one extra that includes others
            continue
        bound = lower(requirement.specifier)
        assert bound is not None, f"{group}: {requirement} has no lower bound"
        if name in tested:
            assert tested[name] in requirement.specifier, f"{group}: {requirement}, {tested[name]}"
            assert tested[name].release[0] - bound.release[0] <= 2, f"{requirement} is years old"
        else:
            assert group in ("mobilellm", "dev"), f"{group}: {requirement} is not pinned"


def test_a_package_is_asked_for_alike_everywhere(project):
    said: dict[str, tuple[str, SpecifierSet]] = {}
    for group, requirement in asked(project):
        name = canonicalize_name(requirement.name)
        before, specifier = said.setdefault(name, (group, requirement.specifier))
        assert requirement.specifier == specifier, f"{name}: {before} and {group} differ"


def test_bounds_reach_what_the_code_needs(project):
    """Versions below which something that the code calls does not exist."""
    bounds = {canonicalize_name(r.name): lower(r.specifier) for _, r in asked(project)}
    # per_layer_config and register_patch_mapping; broadcasts to `group_src` and FSDP2's
    # full state dicts by rank 0; Accelerator.free_memory with `fully_shard`ed models.
    for name, needed in (("transformers", "5.17"), ("torch", "2.8"), ("accelerate", "1.10")):
        found = bounds[name]
        assert found is not None
        assert found >= Version(needed), name
