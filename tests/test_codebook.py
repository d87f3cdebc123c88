"""GRACE's codebook: the rules against a table worked by hand and a brute-force dictionary; and as parts of patches, at run time."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from conftest import hooks_of, tiny_model
from errata.codebook import CodebookEntry, Place, Routed
from errata.edit import EditRequest
from errata.errors import BaseMismatchError, ConfigError, EditError, PatchFormatError, RequestError, ShapeError
from errata.maths.codebook import GAP, Codebook, Rules
from errata.model.anatomy import anatomy
from errata.model.fingerprint import base_of
from errata.model.hooks import Capture
from errata.model.tokens import pad
from errata.output_table import OUTPUTS
from errata.patch import Patch, attach_rows

A, B = (1,), (2,)
EXACT = Rules(same=0.0)


def point(*xy: float) -> Tensor:
    return torch.tensor(xy, dtype=torch.float64)


def table(book: Codebook) -> list[tuple[tuple[float, ...], float, tuple[int, ...]]]:
    """(key, radius, label) of each entry, to nine digits."""
    keys = [tuple(round(float(x), 9) for x in key) for key in book.keys]
    return list(zip(keys, [round(float(r), 9) for r in book.radii], book.labels, strict=True))


def filled(rules: Rules, *inserts: tuple[Tensor, float, tuple[int, ...]]) -> tuple[Codebook, list[str]]:
    book = Codebook(rules)
    done = [
        book.insert(key, torch.full((1,), float(i)).double(), r, label, str(i))
        for i, (key, r, label) in enumerate(inserts)
    ]
    return book, [d.outcome for d in done]


# -- the rules -------------------------------------------------------------------------------------------------------------


def test_the_published_rules_by_hand() -> None:
    """Algorithm 1 step by step: D > eps + eps_n adds, another label splits at D / 2, the same label expands."""
    book, outcomes = filled(
        replace(EXACT, guard=False, expand="coverage", defer="nearest"),
        (point(0, 0), 1.0, A),
        (point(3, 0), 1.0, B),  # D = 3 > 2: add
        (point(0, 1.5), 1.0, A),  # D = 1.5 <= 2, same label, outside the ball: expand to 1.5
        (point(0, -1), 1.0, A),  # inside: nothing
        (point(1, 0), 1.0, B),  # D = 1 to (0, 0), another label: split, radii 0.5 - 1e-5 and 0.5
        (point(6, 0), 1.0, A),  # D = 3 > 2: add
        (point(6, 5), 4.5, B),  # D = 5 <= 5.5: a split, which enlarges the ball of (6, 0) from 1 to 2.5
    )
    assert outcomes == ["add", "add", "expand", "cover", "split", "add", "split"]
    assert table(book) == [
        ((0, 0), 0.5 - GAP, A),
        ((3, 0), 1.0, B),
        ((1, 0), 0.5, B),
        ((6, 0), 2.5 - GAP, A),
        ((6, 5), 2.5, B),
    ]
    adding, _ = filled(replace(EXACT, guard=False), (point(0, 0), 1.0, A), (point(0, 1.5), 1.0, A))
    assert table(adding) == [((0, 0), 2.0, A)]
    moving, _ = filled(
        replace(EXACT, guard=False, expand="moving_average"), (point(0, 0), 1.0, A), (point(0, 1.5), 1.0, A)
    )
    assert table(moving) == [((0, 0.75), 1.5, A)]


def test_our_rules_by_hand() -> None:
    book, outcomes = filled(
        EXACT,
        (point(0, 0), 2.5, A),
        (point(3.5, 0), 1.5, B),  # meets the first ball: split at 1.75, where neither grows
        (point(0, 2.5), 1.0, A),  # expands the first by its initial 1.0, capped before the ball of (3.5, 0)
        (point(3.5, 0), 0.5, A),  # the same key, another label: changed in place, and its ball is a new one's
        (point(10, 0), 1.0, B),
        (point(10, 1.2), 1.0, A),  # another label in reach: both give way
    )
    assert outcomes == ["add", "split", "add", "replace", "add", "split"]
    assert table(book) == [
        (
            (0, 0),
            1.75 - GAP,
            A,
        ),  # 2.5 - expansion to 2.75 would have met the ball of (3.5, 0), so (0, 2.5) is its own entry
        ((3.5, 0), 0.5, A),
        ((0, 2.5), 1.0, A),
        ((10, 0), 0.6 - GAP, B),
        ((10, 1.2), 0.6, A),
    ]
    grown, outcomes = filled(
        EXACT, (point(0, 0), 1.0, A), (point(0, 1.5), 1.0, A), (point(4, 0), 1.0, B), (point(0, 2.9), 1.0, A)
    )
    assert outcomes == ["add", "expand", "add", "expand"]
    assert [round(r, 4) for _, r, _ in table(grown)] == [3.0, 1.0]  # add_init twice, up to the other label's ball


def test_a_query_goes_to_the_nearest_ball_that_contains_it() -> None:
    """A key at 0 with radius 2.5, others at 1.9 and 3.5: the point 2.4 lies in the farther ball alone."""
    inserts = ((point(0, 0), 2.5, A), (point(1.9, 0), 0.3, A), (point(3.5, 0), 0.5, B))
    query = point(2.4, 0)[None]
    for defer, expected in (("containing", 0), ("nearest", -1)):
        book = Codebook(replace(EXACT, defer=defer))
        for key, radius, label in inserts:
            book._new("add", key, key, radius, label, "", 0.0)
        entry, distance = book.find(query)
        assert int(entry) == expected and float(distance) == pytest.approx(2.4 if expected == 0 else math.inf)


def test_labels_are_compared_as_labels() -> None:
    """(1, 5) and (2, 4) have equal means: the published comparison merges two edits that contradict each other."""
    ends = ((point(0, 0), 1.0, (1, 5)), (point(1.5, 0), 1.0, (2, 4)))
    assert filled(replace(EXACT, match="mean"), *ends)[1] == ["add", "expand"]
    assert filled(EXACT, *ends)[1] == ["add", "split"]


@dataclass
class Item:
    key: list[float]
    radius: float
    label: tuple[int, ...]
    tag: str


def brute(items: list[Item], key: list[float], radius: float, label: tuple[int, ...], tag: str, rules: Rules) -> None:
    """The guarded rules over a plain list, one entry after another."""
    if not items:
        items.append(Item(key, radius, label, tag))
        return
    slack = rules.same * math.hypot(*key)
    far = [math.dist(item.key, key) for item in items]
    near = min(range(len(items)), key=far.__getitem__)
    inside = [i for i in range(len(items)) if far[i] <= items[i].radius]

    def give_way(centre: list[float], own: tuple[int, ...]) -> float:
        limit = radius
        for item in items:
            d = math.dist(item.key, centre)
            if item.label != own and d <= item.radius + radius:
                item.radius, limit = min(item.radius, max(d / 2 - GAP, d / 4)), min(limit, d / 2)
        return limit

    if far[near] <= slack:
        if items[near].label != label:
            radius = min(radius, items[near].radius)
            items[near].label, items[near].tag = label, tag
            items[near].radius = give_way(items[near].key, label)
        return
    if inside and items[min(inside, key=far.__getitem__)].label == label:
        return
    if items[near].label == label and far[near] <= radius + items[near].radius:
        moving = rules.expand == "moving_average"
        centre = [(a + b) / 2 for a, b in zip(items[near].key, key, strict=True)] if moving else items[near].key
        wanted = items[near].radius + radius if rules.expand == "add_init" else far[near] + slack
        for item in items:
            if item.label != label:
                wanted = min(wanted, math.dist(item.key, centre) * (1 - 1e-6) - item.radius)
        if wanted >= (far[near] / 2 + slack if moving else far[near]):
            items[near].key, items[near].radius = centre, wanted
            return
    items.append(Item(key, give_way(key, label), label, tag))


@pytest.mark.parametrize("expand", ["add_init", "coverage", "moving_average"])
def test_a_thousand_operations_against_a_dictionary(expand: Any) -> None:
    """Insert and ask at random; after each insertion no key of one label lies in a ball of another, nor do balls overlap."""
    rng, rules = random.Random(7), Rules(expand=expand)
    book, items = Codebook(rules), list[Item]()
    asked = hits = 0
    for step in range(1000):
        place = [rng.gauss(0, 4), rng.gauss(0, 4)]
        if items and rng.random() < 0.1:
            place = list(rng.choice(items).key)
        if rng.random() < 0.6:
            label, radius = (rng.randrange(4),), rng.choice((0.2, 0.7, 1.5))
            book.insert(point(*place), point(step), radius, label, str(step))
            brute(items, place, radius, label, str(step), rules)
            assert len(book) == len(items)
            if step % 7:
                continue
            apart = torch.cdist(book.keys, book.keys, compute_mode="donot_use_mm_for_euclid_dist")
            label_of = torch.tensor(book.labels)
            unlike = label_of != label_of.T
            sums = book.radii[:, None] + book.radii
            assert not bool((unlike & (sums > apart)).any()) and not bool((unlike & (apart <= book.radii)).any())
        elif items:
            asked += 1
            inside = [(math.dist(i.key, place), n) for n, i in enumerate(items) if math.dist(i.key, place) <= i.radius]
            entry, distance = book.find(point(*place)[None])
            assert int(entry) == (min(inside)[1] if inside else -1)
            hits += bool(inside)
            assert float(distance) == pytest.approx(min(inside)[0] if inside else math.inf, abs=1e-12)
    assert [i.label for i in items] == book.labels
    assert torch.allclose(book.radii, torch.tensor([i.radius for i in items], dtype=torch.float64), atol=1e-12)
    assert torch.allclose(book.keys, torch.tensor([i.key for i in items], dtype=torch.float64))
    assert asked > 300 and 50 < hits < asked


def test_many_queries_are_answered_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    book = Codebook()
    for i in range(60):
        book._new("add", 100 + torch.randn(64, generator=generator), torch.zeros(2), 8.0 + i / 20, (i,), "", 0.0)
    queries = 100 + torch.randn(500, 64, generator=generator)
    far = book.distances(queries)
    held = torch.where(far <= book.radii, far, torch.inf)
    best = held.min(-1)
    entry, distance = book.find(queries)
    assert 20 < int((entry >= 0).sum()) < 500
    assert torch.equal(entry, torch.where(best.values.isfinite(), best.indices, -1))
    assert torch.allclose(distance, best.values)


def test_what_is_refused() -> None:
    book = Codebook()
    book.insert(torch.zeros(3), torch.zeros(2), 1.0, A)
    with pytest.raises(ShapeError, match=r"key \(3,\) and a value \(2,\), found \(2,\)"):
        book.insert(torch.zeros(2), torch.zeros(2), 1.0, A)
    with pytest.raises(ConfigError, match="radius above 0"):
        book.insert(torch.zeros(3), torch.zeros(2), 0.0, A)
    with pytest.raises(ConfigError, match="found .*always"):
        Rules(expand="always")  # type: ignore[arg-type]
