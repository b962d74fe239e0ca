"""What sweeps run by default still has every two values of two arguments together, and leaves no case out."""

from __future__ import annotations

import itertools

from sweeps import covering, pairs_of, swept

AXES = ([1, 2, 3, 4], "abcd", [True, False], ("x", "y", "z"))


def possible(number, letter, flag, _last) -> bool:
    return flag or (number != 2 and letter != "b")


def test_every_two_values_of_two_arguments_meet_by_default_and_no_case_is_lost():
    for kept in (lambda *_: True, possible):
        every = [cell for cell in itertools.product(*AXES) if kept(*cell)]
        made = swept(*AXES, kept=kept)
        assert [tuple(getattr(each, "values", each)) for each in made] == every
        marked = [[mark.name for mark in getattr(each, "marks", ())] for each in made]
        by_default = [cell for cell, marks in zip(every, marked, strict=True) if not marks]
        assert set().union(*map(pairs_of, by_default)) == set().union(*map(pairs_of, every))
        assert {name for names in marked for name in names} == {"slow"}
        assert 16 <= len(by_default) < len(every) / 2


def test_as_few_cases_as_values_can_meet_in_are_chosen_and_always_the_same():
    cells = list(itertools.product(*AXES))
    assert len(covering(cells)) == 4 * 4
    assert covering(cells) == covering(cells)
    assert covering(itertools.product("abc")) == []
