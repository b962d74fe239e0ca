"""The laws that tests state, and how many cases each is tried on: `LAWS.txt`, which may only grow.

    python tests/laws.py            # what the tests have that the record lacks, and the other way round
    python tests/laws.py --write    # add new laws and raise numbers of cases; nothing is taken away

A law is a test function. Its line in the record has the number of its cases, how they run ("default", "slow" or "gpu" where every
one is so marked), the world sizes that its default cases name, and where it stands. A law that gets a better name gets it in the
record too, by hand. Cases may become slow, where cheaper ones stay; `test_laws.py` fails where a law is gone, has fewer cases, or
lost its last default case or that of a world size.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
RECORD = TESTS / "LAWS.txt"
COLLECTED = pytest.StashKey[dict[tuple[str, str], "Law"]]()


@dataclass
class Law:
    """Cases of one test function, by how they run."""

    file: str
    name: str
    cases: int = 0
    runs: str = "gpu"
    worlds: set[int] = field(default_factory=set)

    @property
    def line(self) -> str:
        worlds = ",".join(map(str, sorted(self.worlds))) or "-"
        return f"{self.cases:4}  {self.runs:7}  {worlds:7}  {self.file}::{self.name}"

    @classmethod
    def parse(cls, line: str) -> Law:
        cases, runs, worlds, place = line.split()
        file, _, name = place.partition("::")
        return cls(file, name, int(cases), runs, set() if worlds == "-" else {int(world) for world in worlds.split(",")})

    def add(self, item: pytest.Item) -> None:
        """Count a collected case."""
        runs = next((mark for mark in ("gpu", "slow") if item.get_closest_marker(mark)), "default")
        self.cases += 1
        self.runs = min(self.runs, runs, key=("default", "slow", "gpu").index)
        world = getattr(item, "callspec", None) and item.callspec.params.get("world")
        if runs == "default" and isinstance(world, int):
            self.worlds.add(world)


def count(items: Iterable[pytest.Item]) -> dict[tuple[str, str], Law]:
    """The laws of collected tests."""
    laws: dict[tuple[str, str], Law] = {}
    for item in items:
        key = item.path.name, item.originalname
        laws.setdefault(key, Law(*key)).add(item)
    return laws


def recorded() -> dict[tuple[str, str], Law]:
    """The laws of the record."""
    laws = [Law.parse(line) for line in RECORD.read_text().splitlines() if line and not line.startswith("#")]
    return {(law.file, law.name): law for law in laws}


def named() -> Counter[str]:
    """How many test functions of each name the files have, read without importing them."""
    trees = [ast.parse(path.read_text()) for path in TESTS.glob("test_*.py")]
    return Counter(
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )


def losses(before: Iterable[Law], now: dict[tuple[str, str], Law]) -> list[str]:
    """What collected laws lack of those of the record, in words. A law that moved to another file is looked up by its name."""
    by_name: dict[str, list[Law]] = {}
    for law in now.values():
        by_name.setdefault(law.name, []).append(law)
    texts = []
    for old in before:
        others = by_name.get(old.name, [])
        new = now.get((old.file, old.name)) or (others[0] if len(others) == 1 else None)
        if new is None:
            texts.append(f"{old.file}::{old.name} is gone")
        elif new.cases < old.cases:
            texts.append(f"{old.file}::{old.name} has {new.cases} cases, had {old.cases}")
        elif old.runs == "default" != new.runs:
            texts.append(f"{old.file}::{old.name} has no case left that runs by default")
        elif old.worlds - new.worlds:
            texts.append(f"{old.file}::{old.name} has no default case left of world sizes {sorted(old.worlds - new.worlds)}")
    return texts


class Collected:
    """A pytest plugin that keeps the laws of all tests."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.laws = count(items)


def merged(old: Law | None, new: Law) -> Law:
    if old is None:
        return new
    runs = min(old.runs, new.runs, key=("default", "slow", "gpu").index)
    return Law(new.file, new.name, max(old.cases, new.cases), runs, old.worlds | new.worlds)


def main() -> int:
    collected, old = Collected(), recorded() if RECORD.exists() else {}
    if pytest.main(["--collect-only", "-qq", "-m", "", str(TESTS)], plugins=[collected]):
        return 2
    lost = losses(old.values(), collected.laws)
    laws = {key: merged(old.get(key), law) for key, law in collected.laws.items()}
    news = [law.line for key, law in sorted(laws.items()) if key not in old or law != old[key]]
    print(*(f"lost: {text}" for text in lost), *(f"new: {line}" for line in news), f"{len(laws)} laws", sep="\n")
    if "--write" in sys.argv and not lost:
        head = "# cases, how they run, world sizes of default cases, law. Written by laws.py, which only adds.\n"
        RECORD.write_text(head + "".join(f"{law.line}\n" for _, law in sorted(laws.items())))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
