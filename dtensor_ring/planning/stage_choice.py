"""In how many stages "ring" fetches keys where the caller leaves it open: by a `CostModel`, among those that memory allows.

    8 ranks of 8192 tokens on H100       200 GB/s    1 stage      the rank's own keys hide it, and merging costs more than waiting
                                         45 GB/s     3 stages     1 2 4: each hides behind the one before

No plan is made: what a stage brings and computes is worked out from lengths, for the most loaded rank. Where documents are cut one
by one a rank needs keys of few others, which may all come in one stage: there the keys of every other rank are counted by
themselves, for the ranks that fetch the most. So the choice takes a few milliseconds for 64 ranks, tens where thousands of
documents are cut, once a batch; and it is the same on every rank: a function of what ranks compare.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate, pairwise
from typing import NamedTuple

from dtensor_ring.planning.cost_model import BLOCK, Link, Work
from dtensor_ring.planning.predict import Leg, Predictor, Seconds, won_beside
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.runs import cut
from dtensor_ring.planning.schedule import CALLS_OF_TWO_STREAMS, KERNELS_OF_TWO_STREAMS
from dtensor_ring.planning.stages import BUFFERED_TOKENS, stage_sizes
from dtensor_ring.planning.totals import totals

_WORTH = 1.005  # how much slower the fewest stages may be: less than what is predicted wrongly, and they need no tuning
_DOCUMENTS = 1000  # of more, some stand for all
_COUNTED = 200  # of so many, or fewer, every rank's part is counted
_FEW, _LOOKED_AT = 8, 3  # ranks whose pieces of documents are looked at: all of a few, of more so many
_IN_A_ROW = 6  # stage counts that are looked at one by one; beyond them a few of each doubling


class Share(NamedTuple):
    """What the most loaded rank computes and fetches, worked out from lengths.

    Attributes:
        tokens: queries, and keys, that it holds.
        own: scores of one head with its own keys.
        other: scores of one head with the keys of each other rank: of the one before it, the one before that, ...
        keys: keys that it fetches of each other rank, in that order.
        sent: its own keys that it sends in the step of each, to the rank as far after it.
        calls: kernel calls on the keys of several ranks.
        touched: queries that these calls merge, in all.
        calls_on_one: kernel calls on the keys of one rank.
        touched_by_one: queries that these merge.
        spread: whether each of several calls has its own part of the keys, and not all of them.
    """

    tokens: int
    own: float
    other: tuple[float, ...]
    keys: tuple[float, ...]
    sent: tuple[float, ...]
    calls: int
    touched: float
    calls_on_one: int
    touched_by_one: float
    spread: bool = True


def choose_stages(problem: AttentionProblem, predictor: Predictor, most_tokens: int = BUFFERED_TOKENS) -> AttentionProblem:
    """The problem with the stages that are predicted fastest, of those whose buffers stay within the keys of `most_tokens`.

    What counts is the worse of a forward pass alone and of a training step, each beside its best; among stages that are within
    half a hundredth of each other the fewest. Where no link is known, or ranks know only their own documents, the fewest.

    Args:
        problem: what is planned; its own stages are left aside.
        predictor: the machine, the kernel, the sizes and the link, equal on all ranks.
        most_tokens: as for `AttentionProblem.staged`.
    """
    fewest = problem.staged(0, most_tokens)
    link, others = predictor.link, problem.world - 1
    if not (problem.q_length and problem.k_length):
        return fewest
    if link is None or fewest.stages in (0, others) or problem.is_halo or not problem.segmentation.is_shared:
        return fewest
    shares = shares_of(problem)
    times = {}
    for count in candidates(fewest.stages, others):
        of_shares = [staged_times(problem, share, predictor, count) for share in shares]
        times[count] = Seconds(max(t.forward for t in of_shares), max(t.backward for t in of_shares))
    forward, both = min(t.forward for t in times.values()), min(t.both for t in times.values())
    losses = {count: max(t.forward / forward, t.both / both) for count, t in times.items()}
    least = min(losses.values())
    return problem.staged(next(count for count, loss in losses.items() if loss <= least * _WORTH))


def candidates(fewest: int, others: int) -> list[int]:
    """Numbers of stages that are compared: from the fewest on, which need the most memory, to one for each other rank."""
    counts = list(range(fewest, min(fewest + _IN_A_ROW, others)))
    while counts and counts[-1] + counts[-1] // 2 < others:
        counts.append(counts[-1] + max(1, counts[-1] // 2))
    return [*counts, others]


def shares_of(problem: AttentionProblem) -> list[Share]:
    """What the most loaded rank has; with documents an average one, or where they are cut one by one those that fetch the most."""
    if not problem.layout.cut:
        return [_share_of_lengths(problem)]
    pieces = _dealt(problem)
    fetched = sorted(range(problem.world), key=lambda rank: (-_fetched(problem, pieces[rank]), rank))
    looked_at = fetched[: problem.world if problem.world <= _FEW else _LOOKED_AT]
    holders: dict[int, list[tuple[int, _Held]]] = {piece.document: [] for rank in looked_at for piece in pieces[rank]}
    for rank, of_rank in enumerate(pieces):
        for piece in of_rank:
            if piece.document in holders:
                holders[piece.document].append((rank, piece))
    return [_share_of_pieces(problem, rank, pieces[rank], holders) for rank in looked_at]


def _share_of_lengths(problem: AttentionProblem) -> Share:
    """The share of the most loaded rank, or with documents of an average one: all other ranks have as much of its keys."""
    world, layout = problem.world, problem.layout
    queries, keys = -(-problem.q_length // world), -(-problem.k_length // world)
    scores, inside, reach = _documents(problem)
    own, other, fetched = inside / world, (scores - inside) / (world * (world - 1)), float(keys)
    if problem.documents is None and problem.band.lo is None and problem.band.hi is None:
        return _even(world, Share(queries, queries * keys, (queries * keys,), (keys,), (keys,), 1, queries, 1, queries))
    if problem.documents is None and _is_causal(problem):
        # The last rank of contiguous shards sees all keys; elsewhere every rank has the same.
        own = queries * keys / 2
        other = 2 * own if layout.chunks == 1 else own
    else:
        fetched = min(fetched, layout.chunks * reach / (world - 1))
        if len(problem.bounds) == 1 and problem.segmentation.parts <= _COUNTED:
            # Ranks differ by several times where documents lie as they fall.
            counted = totals(problem)
            most = counted.most_loaded
            other, fetched = (max(counted.scores[most] - own, 0) / (world - 1), max(counted.fetched) / (world - 1))
    if problem.documents is not None:
        # Packed calls merge all queries.
        return _even(world, Share(queries, own, (other,), (fetched,), (fetched,), 2, 2 * queries, 2, 2 * queries, spread=False))
    # In a zigzag all queries see the early keys of other ranks, and the later half of them the late keys too.
    calls, touched = (2, 1.5 * queries) if layout.chunks > 1 else (1, queries)
    return _even(world, Share(queries, own, (other,), (fetched,), (fetched,), calls, touched, 1, queries))


def _even(world: int, share: Share) -> Share:
    """The share with what is given of one other rank for each of them."""
    others = world - 1
    return share._replace(other=share.other * others, keys=share.keys * others, sent=share.sent * others)


class _Held(NamedTuple):
    """A piece of a document that a rank holds: where it starts in it, its tokens, and the tokens of the whole document."""

    document: int
    first: int
    count: int
    length: int


def _dealt(problem: AttentionProblem) -> list[list[_Held]]:
    """The pieces of every rank in a layout that cuts documents, by which the batch is laid out anyway."""
    bounds = problem.bounds[0] or (0, problem.k_length)
    return [
        [
            _Held(d, piece.run.start - bounds[d], piece.run.count, bounds[d + 1] - bounds[d])
            for piece in cut(runs, problem.bounds[0])
            for d in (piece.document,)
        ]
        for runs in problem.layout.deal(problem.k_length, problem.world, problem.bounds[0])
    ]


def _is_causal(problem: AttentionProblem) -> bool:
    return problem.band.hi is None and problem.band.lo is not None


def _fetched(problem: AttentionProblem, pieces: list[_Held]) -> int:
    """Keys that a rank fetches: of each of its documents those that its last token sees, but for its own."""
    seen = {piece.document: piece.first + piece.count if _is_causal(problem) else piece.length for piece in pieces}
    return sum(seen.values()) - sum(piece.count for piece in pieces)


def _share_of_pieces(
    problem: AttentionProblem, rank: int, pieces: list[_Held], holders: dict[int, list[tuple[int, _Held]]]
) -> Share:
    """The share of a rank that holds pieces of documents, whose keys before or between them it fetches of those that hold them.

    One piece [3, 5) of a document of 9 tokens, causal: 3 own scores, 6 with keys fetched, of which there are 3.
    """
    world, is_causal = problem.world, _is_causal(problem)
    held, own, queries = Counter[int](), 0.0, 0
    other, keys, sent = ([0.0] * (world - 1) for _ in range(3))
    counted: set[tuple[int, _Held]] = set()
    for mine in pieces:  # those of one document in the order of their tokens
        own += mine.count * (held[mine.document] + mine.count / 2 if is_causal else 2 * held[mine.document] + mine.count)
        held[mine.document] += mine.count
        if len(holders[mine.document]) == 1:  # whole, as most documents are
            continue
        others = [each for each in holders[mine.document] if each[0] != rank]
        needed = [each for each in others if not (is_causal and each[1].first > mine.first)]
        for owner, piece in needed:
            distance = (rank - owner) % world - 1
            other[distance] += mine.count * piece.count
            keys[distance] += 0 if (owner, piece) in counted else piece.count
        counted.update(needed)
        for taker in {taker for taker, piece in others if not (is_causal and piece.first < mine.first)}:
            sent[(taker - rank) % world - 1] += mine.count
        queries += mine.count if needed else 0
    return Share(held.total(), own, tuple(other), tuple(keys), tuple(sent), 2, queries, 2, queries, spread=False)


def _documents(problem: AttentionProblem) -> tuple[float, float, float]:
    """Scores of one head; those whose query and key lie in one chunk of the layout; keys a chunk reaches back over, on average."""
    band, chunk = problem.position_band, problem.k_length / (problem.world * max(1, problem.layout.chunks))
    bounds = problem.bounds[0] or (0, problem.k_length)
    every = -(-(len(bounds) - 1) // _DOCUMENTS)
    # Of many documents every second, third ... stands for its neighbours.
    lengths = [b - a for a, b in pairwise(bounds)][::every]
    weight = problem.k_length / max(1, sum(lengths))
    sides = [side for side in (band.lo, band.hi) if side is not None]
    window = max(map(abs, sides)) + 1 if len(sides) == 2 else problem.k_length
    halves = 1.0 if not sides else 0.5
    scores = inside = reach = 0.0
    for length in lengths:
        seen = min(window, length)
        of_document = halves * length * seen * (2 - seen / length)
        # Two tokens a distance apart lie in one chunk as often as the distance leaves of the chunk.
        together = 1 - seen / (3 * chunk) if seen <= chunk else chunk / seen - chunk**2 / (3 * seen**2)
        scores += of_document
        inside += of_document * max(0.0, together)
        reach += length * seen / 2
    return scores * weight, inside * weight, reach * weight / max(1, problem.k_length)


def staged_times(problem: AttentionProblem, share: Share, predictor: Predictor, stages: int) -> Seconds:
    """What a rank takes in so many stages."""
    edges = list(accumulate(stage_sizes(problem.world - 1, stages), initial=1))
    speed = predictor.speed
    fetches = [_seconds(problem, share, predictor, range(a, b)) for a, b in pairwise(edges)]
    is_masked = problem.band.lo is not None or problem.band.hi is not None
    rows = -(-share.tokens // BLOCK)
    own_blocks = int(share.own / BLOCK**2) + (rows // 2 if is_masked else 0) + 1
    own = Work(rows, rows if is_masked else 0, rows, own_blocks, rows)
    batch, start = predictor.shape.batch, predictor.model.step * 1e-9
    longest = [predictor.row(rows, each) for each in (speed.forward, speed.backward)]
    forward = [Leg(0.0, start + predictor.timed(own, batch, speed.forward), longest=longest[0])]
    backward = [Leg(0.0, start + predictor.timed(own, batch, speed.backward), longest=longest[1])]
    # Most stages of many bring keys of as many ranks as others do, and as many of them.
    computed: dict[tuple[int, float, float], tuple[float, float, float]] = {}
    for (begin, end), fetch in zip(pairwise(edges), fetches, strict=True):
        brought = end - begin, sum(share.keys[begin - 1 : end - 1]), sum(share.other[begin - 1 : end - 1])
        if brought not in computed:
            computed[brought] = _computed(share, predictor, brought, stages)
        once, again, returned = computed[brought]
        forward.append(Leg(fetch, once))
        backward.append(Leg(fetch, again, fetch, returned))
    is_two = _is_on_two_streams(share, predictor, stages)
    passes = predictor.passes(forward, backward, on_two_streams=is_two)
    return predictor.with_host(Seconds(*passes), 1 + stages)


def _is_on_two_streams(share: Share, predictor: Predictor, stages: int) -> bool:
    return stages == 1 and share.calls < CALLS_OF_TWO_STREAMS and predictor.kernel in KERNELS_OF_TWO_STREAMS


def _computed(share: Share, predictor: Predictor, brought: tuple[int, float, float], stages: int) -> tuple[float, float, float]:
    """Seconds that keys take: computing and merging forward, computing backward, adding what comes back.

    `brought` is of how many ranks they are, how many, and the scores with them.
    """
    size, keys, scores = brought
    start = predictor.model.step * 1e-9
    if not keys:
        return start, start, 0.0
    calls, touched = (share.calls, share.touched) if size > 1 else (share.calls_on_one, share.touched_by_one)
    rows = int(touched) // (BLOCK * calls) + 1
    columns = int(keys) // (BLOCK * (calls if share.spread else 1)) + 1
    blocks = int(scores / BLOCK**2 / calls) + 1
    work, batch, speed = Work(rows, 0, columns, blocks, columns), predictor.shape.batch, predictor.speed
    key_bytes = keys * _key_bytes(predictor)
    moved = start + (predictor.copying(4 * key_bytes) if size > 1 else 0.0)  # put in order, and taken out for others
    is_two = _is_on_two_streams(share, predictor, stages)
    merged = predictor.merging(int(touched), (stages > 1 or share.calls > 1) and not is_two)
    summed = predictor.copying(3 * touched * _query_bytes(predictor))
    once, again = (predictor.timed(work, batch, each) for each in (speed.forward, speed.backward))
    won = won_beside([once] * calls, predictor.row(columns, speed.forward)) if is_two else 0.0
    return calls * once - won + moved + merged, calls * again + moved + summed, predictor.copying(4 * key_bytes)


def _query_bytes(predictor: Predictor) -> int:
    shape = predictor.shape
    return shape.batch * shape.heads * shape.v_head_dim * shape.itemsize


def _key_bytes(predictor: Predictor) -> int:
    return predictor.shape.kv_numbers * predictor.shape.itemsize


def _seconds(problem: AttentionProblem, share: Share, predictor: Predictor, distances: range) -> float:
    """The transfer of the keys of ranks so far away, at the place in a host where it takes longest."""
    assert predictor.link is not None, "asked where there is a link"
    steps = slice(distances.start - 1, distances.stop - 1)
    brought = max(sum(share.keys[steps]), sum(share.sent[steps])) * _key_bytes(predictor)
    far = brought * _most_far(problem.world, predictor.link, distances) / len(distances)
    return predictor.link.seconds(brought - far, far)


def _most_far(world: int, link: Link, distances: range) -> int:
    """How many of the ranks at these distances before a rank are on other hosts, at most."""
    host = link.host
    if not host or host >= world:
        return 0
    # A rank's own host has the ranks 1 .. place before it, and those world - host + 1 + place .. world - 1 before it, which are
    # after it. The most are elsewhere where the stage ends just before the latter, or at the first place.
    place = max(distances.stop - 1 - world + host, 0)
    return max(0, distances.stop - max(distances.start, place + 1))


__all__ = ["Share", "candidates", "choose_stages", "shares_of", "staged_times"]
