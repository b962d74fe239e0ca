"""What is kept between calls: laws of one cache, and how much all of them hold."""

from __future__ import annotations

import ctypes
import gc
import platform
import threading
import tracemalloc
import weakref
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers import LAYOUTS, assert_exact, line, make_case, run_loopback, slow
from hypothesis import given
from hypothesis import strategies as st

import dtensor_ring.functional  # every cache is there once its module is loaded
from dtensor_ring import Contiguous, Documents, Zigzag, debug, distribute_tensor, full_tensor, redistribute
from dtensor_ring.cache import Cache, CacheOfEach, cached
from dtensor_ring.ops.executors.plan_executor import _varlen_metadata
from dtensor_ring.planning.document_sharding import share_documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import _book, plan

HOST_BYTES, DEVICE_BYTES = 128 << 20, 64 << 20
NAMES = {
    "calls resolved to kernels",
    "calls that were checked",
    "documents of operators",
    "documents of varlen functions",
    "documents shared out",
    "holders of tokens",
    "index tensors of moves",
    "placements of from_local",
    "places of attention",
    "plans",
    "positions for dropout and ALiBi",
    "places of transfers",
    "segments of packed calls",
    "slices of llama3 functions",
}


class Value:
    """Something of a size that may be referred to weakly."""

    def __init__(self, size: int) -> None:
        self.size = size


class Model:
    """A cache as its laws say: a list of keys, the least recently used first."""

    def __init__(self, most_bytes: int, most_entries: int) -> None:
        self.most_bytes, self.most_entries = most_bytes, most_entries
        self.kept: list[tuple[int, Value]] = []

    def call(self, key: int, value: Value) -> Value:
        for entry in self.kept:
            if entry[0] == key:
                self.kept.remove(entry)
                self.kept.append(entry)
                return entry[1]
        if value.size <= self.most_bytes:
            self.kept.append((key, value))
            self.shrink()
        return value

    def shrink(self) -> None:
        while len(self.kept) > self.most_entries or sum(value.size for _, value in self.kept) > self.most_bytes:
            too_large = [entry for entry in self.kept if entry[1].size > self.most_bytes]
            self.kept.remove(too_large[0] if too_large else self.kept[0])


calls = st.lists(st.tuples(st.sampled_from(["call", "grow"]), st.integers(0, 7), st.integers(0, 25)), max_size=60)


@given(calls, st.integers(1, 20), st.integers(1, 6))
def test_a_cache_keeps_what_was_used_last_and_never_more_than_its_limits(operations, most_bytes, most_entries):
    model, made = Model(most_bytes, most_entries), []
    next_size = [0]

    @cached("model", most_bytes=most_bytes, most_entries=most_entries, size=lambda value, key: value.size)
    def value_of(key: int) -> Value:
        made.append(Value(next_size[0]))
        return made[-1]

    for what, key, number in operations:
        next_size[0], before = number, len(made)
        value = value_of(key)
        assert value is model.call(key, made[-1] if len(made) > before else value)
        if what == "grow":
            value.size += number
            value_of.resize(value, key)
            model.shrink()
        use = value_of.cache_info()
        assert use.entries == len(model.kept) <= most_entries
        assert use.bytes == sum(each.size for _, each in model.kept) <= most_bytes
    # Every value that the model keeps is kept, in its order: each new one drives out the first of those that are left.
    for key, value in list(model.kept):
        assert value_of(key) is value


@given(st.permutations(range(4)))
def test_the_least_recently_used_leaves_first(order):
    cache, kept = Cache("order", most_bytes=100, most_entries=4), {}
    for key in range(4):
        cache.keep(key, value := Value(1), 1)
        kept[key] = weakref.ref(value)
    del value
    for key in order:
        cache.find(key)
    for place in range(4):
        cache.keep(("new", place), "new", 1)
        assert [key for key in order if kept[key]() is not None] == list(order[place + 1 :])


def test_what_is_larger_than_the_limit_is_returned_and_not_kept_and_drives_nothing_out():
    @cached("large", most_bytes=10, most_entries=5, size=lambda value, key: len(value))
    def text(key: int) -> str:
        return "x" * key

    small = text(4)
    assert text(11) == "x" * 11
    assert text(4) is small
    assert text.cache_info()[1:] == (1, 4, 5, 10, 1)
    assert len(text(10)) == 10
    assert text.cache_info()[1:3] == (1, 10)


def test_arguments_by_name_by_place_and_of_other_functions_are_kept_apart():
    cache, numbers = Cache("shared", most_bytes=100, most_entries=10), count()

    @cache.keeps(lambda value, *args, **names: 1)
    def first(a: object, b: object = None) -> int:
        """Words."""
        return next(numbers)

    @cache.keeps(lambda value, *args, **names: 1)
    def second(a: object, b: object = None) -> int:
        return next(numbers)

    answers = [first(1, 2), first(1, b=2), second(1, 2), first((1, 2)), first(1), first(a=1)]
    assert answers == list(range(6))
    assert [first(1, 2), first(1, b=2), second(1, 2), first((1, 2)), first(1), first(a=1)] == answers
    assert cache.use().entries == 6
    assert (first.__name__, first.__doc__) == ("first", "Words.")
    first.cache_clear()
    assert cache.use()[1:3] == (0, 0)
    assert first(1, 2) == 6


def test_an_error_is_raised_each_time_and_nothing_is_kept():
    @cached("errors", most_bytes=10, most_entries=5, size=lambda value, key: 1)
    def half(key: int) -> int:
        raise ValueError(f"{key} is odd")

    for _ in range(2):
        with pytest.raises(ValueError, match="3 is odd"):
            half(3)
    assert half.cache_info().entries == 0


def test_threads_get_one_object_for_each_key_and_never_exceed_the_limits():
    start, errors, seen = threading.Barrier(8), [], []

    @cached("threads", most_bytes=40, most_entries=6, size=lambda value, key: value.size)
    def value_of(key: int) -> Value:
        return Value(key)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        for key in torch.randint(1, 12, (2000,), generator=generator).tolist():
            value = value_of(key)
            use = value_of.cache_info()
            if value.size != key or use.entries > 6 or not 0 <= use.bytes <= 40:
                errors.append((key, use))

    together = threading.Barrier(8)

    @cached("slow", most_bytes=40, most_entries=6, size=lambda value: 1)
    def slow() -> Value:
        together.wait()  # all eight threads are inside at once
        return Value(1)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    threads += [threading.Thread(target=lambda: seen.append(slow())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(set(map(id, seen))) == 1


def test_a_value_that_leaves_may_call_its_cache_when_it_ends():
    answers = []

    @cached("ends", most_bytes=100, most_entries=1, size=lambda value, key: 1)
    def value_of(key: int) -> Value:
        value = Value(key)
        if key:
            weakref.finalize(value, lambda: answers.append(value_of(0).size))
        return value

    value_of(1)
    done = threading.Thread(target=value_of, args=(2,), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive()
    assert answers == [0, 0]  # of 1, which 2 drives out, and of 2, which 0 does


def test_every_cache_is_listed_with_its_limits_which_together_are_as_documented():
    uses = [use for use in debug.caches() if use.name in NAMES]
    assert {use.name for use in uses} == NAMES
    assert sum(use.most_bytes for use in uses) <= HOST_BYTES
    assert max(use.most_entries for use in uses) <= 128
    device = "index tensors of moves", "positions for dropout and ALiBi", "places of transfers", "segments of packed calls"
    on_device = [use for use in uses if use.name in device]
    assert sum(use.most_bytes for use in on_device) <= DEVICE_BYTES


def test_modules_keep_nothing_that_grows_in_a_cache_without_a_limit_in_bytes():
    """What `functools` keeps is named here: texts of layouts and bands, numbers of kernels, what the machine has, what is done."""
    package = Path(dtensor_ring.__file__).parent
    lines = {
        (path.relative_to(package).as_posix(), text.strip())
        for path in package.rglob("*.py")
        for text in path.read_text().splitlines()
        if text.strip().startswith(("@cache", "@lru_cache")) and not text.strip().startswith("@cached(")
    }
    assert {(name, text) for name, text in lines if text not in ("@cache", "@cached_property")} == {
        ("planning/layout.py", "@lru_cache(maxsize=64)"),
        ("ops/call.py", "@lru_cache(maxsize=256)"),
        ("planning/mask.py", "@lru_cache(maxsize=256)"),
    }
    assert {name for name, text in lines if text == "@cache"} == {
        "_register.py",
        "_torch_dispatch.py",
        "ops/kernels/flash.py",
        "ops/kernels/flash_attn_3.py",
        "ops/launcher.py",
        "ops/operator.py",
        "comm/process_group.py",
    }


def measured(make) -> tuple[object, int]:
    """A value, and the bytes of Python objects that are there since it was made."""
    gc.collect()
    tracemalloc.start()
    value = make()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return value, size


@pytest.mark.parametrize(
    ("layout", "strategy"),
    [
        ("zigzag", "ring"),
        ("stripe", "gather"),
        *(slow(*cell) for cell in [("contiguous", "ring"), ("contiguous", "gather"), ("zigzag", "gather"), ("stripe", "ring")]),
    ],
)
def test_the_bytes_of_a_plan_are_estimated_honestly(layout, strategy):
    documents = Documents.from_lengths([300 + i % 300 for i in range(900)])
    problem = AttentionProblem(Layout.parse(layout), Band(0), documents.length, documents.length, 4, strategy, documents)
    _book.cache_clear()
    _, size = measured(lambda: plan(problem, 1))
    kept = _book.cache_info()
    assert kept.entries == 1
    assert 0.8 < (kept.bytes - problem.nbytes) / size < 1.4
    packings, size = measured(lambda: _varlen_metadata.__wrapped__(problem, 1, 2, torch.device("cpu")))
    assert 0.8 < (_varlen_metadata._size(packings, problem) - problem.nbytes) / size < 1.4


@pytest.mark.parametrize("number", [100, 1000, slow(5000)])
def test_the_bytes_of_documents_and_of_their_shares_are_estimated_honestly(number):
    lengths = [1000 + i % 1000 for i in range(number)]
    documents, size = measured(lambda: Documents.from_lengths(lengths))
    assert 0.7 < documents.nbytes / (size + documents.encoded.nbytes) < 1.5  # tensors are not traced
    (bounds,), length = documents.bounds, documents.length
    totals = tuple(length * (rank + 1) // 16 - length * rank // 16 for rank in range(16))  # two ranks have a handful of chunks
    shared, size = measured(lambda: share_documents.__wrapped__(bounds, totals))
    # 3 : 2 where no other test has asked before, and every number of `bounds` is shared
    assert 0.7 < (share_documents._size(shared, bounds, totals) - 40 * len(bounds)) / size < 1.55


def packings(number: int) -> Iterator[Documents]:
    for i in range(number):
        yield Documents.from_lengths([3 + i % 5, 1 + i // 5, 96 - 3 - i % 5 - 1 - i // 5])


@pytest.mark.parametrize("layout", ["zigzag/documents", *map(slow, ("contiguous", "zigzag", "stripe", "stripe:3"))])
def test_after_many_packed_batches_nothing_grows_any_more(layout):
    def attend(documents: Documents) -> None:
        case = make_case(96, documents=documents, heads=(1, 1), dim=1, batch=1)
        case.dropout_p = 0.1
        run_loopback(case, layout, 2, "ring", "math")
        Documents.unpack(documents.encoded)

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    batches = list(packings(128))
    for documents in batches[:64]:
        attend(documents)
    uses, before = debug.caches(), objects()
    for documents in batches[64:]:
        attend(documents)
    assert objects() - before < 500
    for use, later in zip(uses, debug.caches(), strict=True):
        assert later.entries == use.entries <= use.most_entries
        assert later.bytes <= 1.5 * use.bytes + 1000  # documents differ
        assert later.bytes <= use.most_bytes


@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_plans_that_are_not_kept_compute_the_same(strategy, monkeypatch):
    documents = Documents.from_lengths([7, 20, 6])
    case = make_case(33, documents=documents)
    monkeypatch.setattr(_book._cache, "_most_bytes", 1)
    _book.cache_clear()
    assert_exact(run_loopback(case, "zigzag", 3, strategy, "math")[0], case.exact())
    assert _book.cache_info().entries == 0
    assert _book.cache_info().too_large > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_one_entry_is_one_problem_with_the_plans_of_all_ranks(layout, strategy):
    problem = AttentionProblem(Layout.parse(layout), Band(0, 5), 60, 60, 4, strategy)
    _book.cache_clear()
    plans = [plan(problem, rank) for rank in range(4)]
    assert _book.cache_info().entries == 1
    assert all(plan(problem, rank) is each for rank, each in enumerate(plans))
    assert problem.is_halo == (layout in ("contiguous", "zigzag"))
    assert _book.cache_info().entries == 1
    _book.cache_clear()
    assert [plan(problem, rank) for rank in (3, 1, 0, 2)] == [plans[rank] for rank in (3, 1, 0, 2)]


def kept_bytes() -> int:
    """Bytes of tensors that stay after moves of many lengths."""
    mesh = line()

    def held() -> int:
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == "cpu" and x._base is None)

    before = held()
    for i in range(30):  # 115 MB, if all were kept
        x = distribute_tensor(torch.empty(200_000 + i), mesh, [Zigzag(0)], src_data_rank=None)
        full_tensor(redistribute(x, [Contiguous(0)]))
    return held() - before


def test_what_moves_keep_is_bounded_in_bytes(pools):
    assert max(pools.run(2, kept_bytes)) < 64 << 20


def resident() -> int:
    """Bytes of this process in memory, without what its allocator holds free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def growth_of_long_varlen_metadata() -> tuple[int, int]:
    """Bytes that the process has more after three packings of a million tokens, and those that caches say they hold."""
    mesh, length = line(), 1 << 20

    def batch(i: int, length: int) -> None:
        each = 300 + 7 * i
        documents = Documents.from_lengths([each] * (length // each) + [length % each])
        x = distribute_tensor(torch.zeros(1, length, 1, 1), mesh, [Zigzag(1)], src_data_rank=None)
        full_tensor(redistribute(x, [Zigzag(1, per_document=True)], documents=documents), documents=documents)
        for layout, strategy in (("zigzag", "ring"), ("zigzag/documents", "ring"), ("zigzag", "gather")):
            problem = AttentionProblem(Layout.parse(layout), Band(0), length, length, mesh.size(), strategy, documents)
            _varlen_metadata(problem, mesh.get_rank(), 1, torch.device("cpu"))

    batch(0, 1 << 12)
    before = resident()
    for i in range(3):
        batch(i, length)
    return resident() - before, sum(use.bytes for use in debug.caches())


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks Linux and glibc for a process' memory")
def test_varlen_metadata_of_a_million_tokens_add_less_memory_than_the_limits(pools):
    for grown, counted in pools.run(2, growth_of_long_varlen_metadata, timeout=280):
        print(f"{grown / 2**20:.0f} MiB more, {counted / 2**20:.0f} MiB in caches")
        assert grown < HOST_BYTES
        assert counted < HOST_BYTES


class Owner:
    """Something that caches belong to."""


def test_a_cache_of_each_object_ends_with_its_object_and_counts_for_all():
    each = CacheOfEach("of each", most_bytes=10, most_entries=2)
    first, second = Owner(), Owner()
    for owner in (first, second):
        for key in range(3):
            each.of(owner).keep(key, f"value {key}", 1)
    assert each.of(first) is each.of(first) is not each.of(second)
    assert each.of(first).find(0) is None, "the oldest of one object left"
    (use,) = (use for use in debug.caches() if use.name == "of each")
    assert use == ("of each", 4, 4, 4, 20, 0)
    del owner, first
    gc.collect()
    assert each.use().entries == 2
