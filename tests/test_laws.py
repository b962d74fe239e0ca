"""Laws that tests once stated stay: none is gone, and none is tried on less."""

from __future__ import annotations

from collections import Counter

import laws
import mutants
import pytest


def test_every_law_of_the_record_is_still_a_test():
    missing = Counter(name for _, name in laws.recorded()) - laws.named()
    assert not missing, "laws may only become more: see tests/laws.py"


def test_no_law_is_tried_on_fewer_cases_or_world_sizes_than_recorded(request):
    if any("::" in argument for argument in request.config.args):
        pytest.skip("single tests were asked for by name")
    collected = request.config.stash[laws.COLLECTED]
    files = {file for file, _ in collected}
    old = [law for law in laws.recorded().values() if law.file in files]
    assert old, "this file's own laws, at least"
    assert not laws.losses(old, collected)


def test_a_loss_is_seen():
    def law(cases: int = 4, runs: str = "default", worlds: tuple[int, ...] = (2, 4), file: str = "test_a.py") -> laws.Law:
        return laws.Law(file, "test_it", cases, runs, set(worlds))

    def lost(*now: laws.Law) -> list[str]:
        return laws.losses([law()], {(each.file, each.name): each for each in now})

    assert laws.Law.parse(law().line) == law()
    assert not lost(law())
    assert not lost(law(5, worlds=(1, 2, 4)), law(1, file="test_b.py"))
    assert not lost(law(file="test_b.py")), "it may move"
    assert lost() == ["test_a.py::test_it is gone"]
    assert lost(law(3)) == ["test_a.py::test_it has 3 cases, had 4"]
    assert lost(law(runs="slow")) == ["test_a.py::test_it has no case left that runs by default"]
    assert lost(law(worlds=(2,))) == ["test_a.py::test_it has no default case left of world sizes [4]"]


def test_the_tests_that_found_mutants_are_still_there():
    """What they found they must find again: `make mutants-again`."""
    killed = mutants.recorded()
    assert len({each[:3] for each in killed}) == len(killed) > 0
    named = laws.named()
    missing = {each.test for each in killed if ".py::" in each.test and each.test.partition("::")[2].partition("[")[0] not in named}
    assert not missing
