"""Steering at run time: every way to run a model says what an uncached step-by-step loop says.

The oracle is the definition, brute force and without a patch: states of the plain model give each prefix's gate, the
tokens give the step, and the maps are applied to exactly those positions of one whole unpadded sequence.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from conftest import hooks_of, prefix_points, steering_part, tiny_model
from errata.errors import EditError
from errata.model.anatomy import anatomy
from errata.model.cache import cache_in, with_cache
from errata.model.fingerprint import base_of
from errata.model.hooks import intervene
from errata.model.states import states_at
from errata.model.tokens import pad
from errata.patch import Handle, Patch, attach_rows
from errata.scope.gate import Gate, Pooling
from errata.scope.recall import AGAIN, ASKED, kinds
from errata.steering.memory import Memory
from errata.steering.parts import Steering
from errata.steering.questions import BEHIND, MARKS, NEAR, WORDS
from errata.steering.table import SteeringTable

NEW = 7  # tokens that every loop decodes
PROMPTS = ([11, 25, 301, 47], [90, 12, 55, 201, 33, 78], [5, 6, 7, 8, 9, 10, 11, 12, 13], [130, 131, 11, 25, 301])
TARGETS = ((70,), (180, 66), (180, 180, 99), (41, 300))  # 1 to 3 tokens; two begin alike; one stutters
CLOSING: tuple[tuple[int, ...], ...] = ((), (13,), (), ())  # one ends with a further map that says a full stop
STOP = 13  # what the others say behind an object that is recalled
FILLER = [21, 150, 22]
AGAINS = ([21, 222], [22, 150, 21, 22, 150, 21, 333, 60, 222])  # asks again; asks something else (333) first
OUTSIDE = ([11, 25, 301, 48], [91, 12, 55, 201, 33, 78, 78, 3], [200, 100])  # two differ from a prompt in a token


@dataclass(frozen=True)
class Case:
    """A model, its edits, rows in scope (the last ones restate a prompt later) and what the oracle loop says to each."""

    model: PreTrainedModel
    parts: tuple[Steering, ...]
    rows: list[list[int]]
    said: list[list[int]]  # NEW tokens per row
    plain: list[list[int]]  # the same from the model without edits
    logits: list[Tensor]  # (T, V) of each row with what was said
    steered: list[list[int]]  # positions of the same, by definition

    def attach(self, tokenizer: PreTrainedTokenizerFast) -> Handle:
        return patch_of(self.model, tokenizer, self.parts).attach(self.model, tokenizer)

    @property
    def outside(self) -> list[int]:
        return list(range(len(self.rows) - len(OUTSIDE), len(self.rows)))

    @property
    def full(self) -> list[list[int]]:
        return [row + said for row, said in zip(self.rows, self.said, strict=True)]


def patch_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, parts: tuple[Steering, ...]) -> Patch:
    return Patch("hand", {}, (), base_of(model, tokenizer), parts)


def steps(model: PreTrainedModel, parts: tuple[Steering, ...], ids: list[int]) -> dict[int, tuple[Steering, int, bool]]:
    """Position -> (edit, step, recalled) by definition, from the plain model."""
    gates = {part.gate.digest: part.gate for part in parts}
    points = {digest: prefix_points(model, ids, gate) for digest, gate in gates.items()}
    kind = kinds_of(model, ids, next(iter(gates.values()))) if gates else []
    opened: list[Opened] = []
    meant: Steering | None = None  # what the last question was about, unless another one stood in between
    held: Steering | None = None  # the last edit that was asked about
    about: list[int] = []  # how its question ended

    def tail(end: int) -> list[int]:
        return ids[max(0, end - WORDS + 1) : max(0, end + 1)]

    for i in range(len(ids)):
        far = [(float((points[p.gate.digest][i] - p.centre).norm()) / p.radius, p) for p in parts]
        nearest, part = min(far, key=lambda pair: pair[0], default=(2.0, None))
        behind = [held is not None and tail(i - t) == about for t in range(BEHIND + 1)]
        asked, again = (bool(kind) and kind[i] == k for k in (ASKED, AGAIN))
        restated = any(behind[: MARKS + 1])
        if nearest <= 1:
            about = tail(i) if part is not meant else about
            meant = held = part
        elif asked and not any(behind) and (part is not meant or nearest >= NEAR):
            meant = None
        elif restated:
            meant = held
        recalled = nearest > 1 and (again or (asked and any(behind) and not restated))
        opened.append((part, False) if nearest <= 1 else (meant, True) if recalled else (None, False))
    chosen: dict[int, tuple[Steering, int, bool]] = {}
    for i in range(len(ids)):
        for t in range(i, -1, -1):  # an object under way goes before a new one
            part, recalled = opened[i - t]
            if part is None or t >= n_steps(part, recalled) or tuple(ids[i - t + 1 : i + 1]) != part.target_ids[:t]:
                continue
            if t or not said_while_open(opened, (part, recalled), ids, i):
                chosen[i] = (part, t, recalled)
            break
    return chosen


Opened = tuple[Steering | None, bool]  # and whether it is only recalled


def n_steps(part: Steering, recalled: bool) -> int:
    """How many positions an edit moves: a recalled object is ended wherever it is known how."""
    ended = recalled and part.ending is not None
    return max(len(part.maps), (len(part.target_ids) + 1) if ended else 0)


def kinds_of(model: PreTrainedModel, ids: list[int], gate: Gate) -> list[int]:
    """The kind of every position, from states read on their own; empty for a gate without cues."""
    if gate.cues is None or gate.cue_layer is None:
        return []
    found: list[int] = kinds(
        states_at(model, [ids], [list(range(len(ids)))], [gate.cue_layer])[gate.cue_layer][0], gate.cues
    ).tolist()
    return found


def said_while_open(opened: list[Opened], part: Opened, ids: list[int], i: int) -> bool:
    """Whether the gate has been open at every position from the end of the edit's object to i."""
    assert part[0] is not None
    n = len(part[0].target_ids)
    return any(
        opened[end - n][0] is part[0]
        and tuple(ids[end - n + 1 : end + 1]) == part[0].target_ids
        and all(now[0] is part[0] for now in opened[end : i + 1])
        for end in range(n, i + 1)
    )


def oracle(model: PreTrainedModel, parts: tuple[Steering, ...], ids: list[int]) -> Tensor:
    """(T, V) logits of one unpadded, uncached row with the maps where the definition wants them."""
    chosen = steps(model, parts, ids)

    def change(site: str | int) -> Any:
        def moved(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            for i, (part, t, recalled) in chosen.items():
                if part.site == site:
                    mean = part.maps[t].m_t if t < len(part.maps) else part.ending
                    assert mean is not None
                    hidden[0, i] = mean if recalled else part.maps[t](hidden[0, i])
            return hidden

        return moved

    paths = {anatomy(model).site(site): change(site) for site in {part.site for part in parts}}
    with torch.no_grad(), intervene(model, paths):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def loop(logits: Any, row: list[int], n: int = NEW) -> list[int]:
    """Greedy decoding of full ids, uncached, step by step; `logits(ids)` gives (T, V)."""
    ids = list(row)
    for _ in range(n):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids[len(row) :]


def build(
    family: str, pooling: Pooling, layers: tuple[int, ...], site: str | int, depth: int = 2, cues: bool = False,
    **changes: Any,
) -> Case:  # fmt: skip
    model = tiny_model(family, layers=depth, **changes)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    later = [[*prompt, *target, *FILLER, *prompt] for prompt, target in zip(PROMPTS[:2], TARGETS[:2], strict=True)]
    # A gate for which a prompt and its restatement are one point: it does not look along their differences.
    raw = Gate(layers=layers, pooling=pooling)
    differences = [prefix_points(model, text, raw)[-1] - prefix_points(model, text[-n:], raw)[-1]
                   for text, n in zip(later, (len(p) for p in PROMPTS), strict=False)]  # fmt: skip
    basis = torch.linalg.qr(torch.stack(differences).T, mode="complete").Q[:, len(differences) :]
    gate = replace(raw, mean=torch.full((len(basis),), 0.1), projection=basis)
    asked_again = [
        [*prompt, *target, *more] for prompt, target in zip(PROMPTS, TARGETS, strict=True) for more in AGAINS
    ]
    if cues:
        gate = replace(gate, cues=some_cues(model, [*later, *asked_again, *OUTSIDE]), cue_layer=0)
    parts = tuple(
        steering_part(model, p, t, gate=gate, site=site, closing=c, ending=STOP if cues and not c else None)
        for p, t, c in zip(PROMPTS, TARGETS, CLOSING, strict=True)
    )
    rows = [*map(list, PROMPTS), *later, *(asked_again if cues else ()), *map(list, OUTSIDE)]
    said = [loop(lambda ids: oracle(model, parts, ids), row) for row in rows]
    plain = [loop(lambda ids: oracle(model, (), ids), row) for row in rows]
    full = [row + more for row, more in zip(rows, said, strict=True)]
    logits = [oracle(model, parts, ids) for ids in full]
    return Case(model, parts, rows, said, plain, logits, [sorted(steps(model, parts, ids)) for ids in full])


def some_cues(model: PreTrainedModel, rows: list[list[int]]) -> Tensor:
    """(d + 1, 3) a classifier for which, in these rows, one token asks again and another asks something."""
    x = torch.cat(states_at(model, rows, [list(range(len(row))) for row in rows], [0])[0])
    ids = [token for row in rows for token in row]
    y = [AGAIN if token == AGAINS[0][-1] else ASKED if token == AGAINS[1][6] else 0 for token in ids]
    found = LogisticRegression(C=100, max_iter=2000, class_weight="balanced").fit(x.numpy(), y)
    return torch.cat([torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)[:, None]], 1).T.float()


CASES: dict[str, tuple[Any, ...]] = {
    "gpt2-last": ("gpt2", "last", (0,), "final", {}),
    "gpt2-mean": ("gpt2", "mean", (0, 1), "final", {}),
    "llama-last": ("llama", "last", (0, 1), "final", {}),
    "llama-mean": ("llama", "mean", (0,), "final", {}),
    "gpt_neox-mean": ("gpt_neox", "mean", (0, 1), "final", {}),
    "mistral-last": ("mistral", "last", (0,), "final", {"sliding_window": 6}),
    "gpt2-layer": ("gpt2", "last", (0,), 1, {"depth": 3}),
    "llama-layer": ("llama", "mean", (0, 1), 1, {"depth": 3}),
    "gpt2-cues": ("gpt2", "last", (0,), "final", {"cues": True}),
    "llama-cues": ("llama", "last", (0, 1), "final", {"cues": True}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    family, pooling, layers, site, changes = CASES[request.param]
    return build(family, pooling, layers, site, **changes)


@pytest.fixture
def handle(case: Case, tokenizer: PreTrainedTokenizerFast) -> Iterator[Handle]:
    hooks = hooks_of(case.model)
    with case.attach(tokenizer) as attached:
        yield attached
    assert hooks_of(case.model) == hooks


def generate(model: PreTrainedModel, rows: list[list[int]], **options: Any) -> list[list[int]]:
    """New tokens of the rows in one left-padded batch (the best beam of each)."""
    batch = pad(rows, 0, side="left")
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    with torch.no_grad():
        found = model.generate(input_ids=batch.ids, attention_mask=batch.mask, **options)
    return found[:, batch.ids.shape[1] :].tolist()


# -- what the edits say ------------------------------------------------------------------------------------------------


def test_the_edits_are_worth_testing(case: Case) -> None:
    """Objects are said, also where the prompt is restated, and nothing else changes its mind."""
    wanted = [(*t, *c) for t, c in zip(TARGETS, CLOSING, strict=True)]
    wanted += wanted[:2]
    for said, plain, target in zip(case.said, case.plain, wanted, strict=False):
        assert tuple(said[: len(target)]) == target != tuple(plain[: len(target)])
        assert tuple(said[len(target) :][: len(target)]) != target  # and then steering has ended
    for row in case.outside:
        assert case.said[row] == case.plain[row]


def test_an_answer_asked_for_again_is_given_again(case: Case) -> None:
    """Behind its question and an objection; not where something else was asked in between."""
    if case.parts[0].gate.cues is None:
        pytest.skip("a gate without cues")
    first, kept = len(PROMPTS) + 2, 0
    for i, target in enumerate(TARGETS):
        again, other = case.said[first + 2 * i : first + 2 * i + 2]
        assert tuple(again[: len(target) + 1]) == (*target, STOP)
        kept += other == case.plain[first + 2 * i + 1]
    assert kept >= 2  # by chance what is asked in between may lie near the same edit


def test_uncached_loop(case: Case, handle: Handle) -> None:
    with torch.no_grad():
        found = [loop(lambda ids: case.model(torch.tensor([ids]), use_cache=False).logits[0], r) for r in case.rows]
    assert found == case.said


def test_generate_row_by_row(case: Case, handle: Handle) -> None:
    assert [generate(case.model, [row])[0] for row in case.rows] == case.said


def test_generate_left_padded(case: Case, handle: Handle) -> None:
    assert generate(case.model, case.rows) == case.said
    assert generate(case.model, case.rows, use_cache=False) == case.said


def test_generate_from_a_given_cache(case: Case, handle: Handle) -> None:
    empty = DynamicCache(config=case.model.config)
    assert generate(case.model, case.rows, **with_cache(case.model, empty)) == case.said


def test_generate_with_drafted_tokens(case: Case, handle: Handle) -> None:
    """Several tokens in one pass, some of them taken back: prompt lookup."""
    if "sliding_window" in case.model.config.to_dict() and case.model.config.sliding_window:
        pytest.skip("transformers does not crop sliding-window caches")
    if transformers.__version__.startswith("4."):
        pytest.skip("prompt lookup without an end token fails in transformers 4")
    row = len(PROMPTS)
    assert generate(case.model, [case.rows[row]], prompt_lookup_num_tokens=3)[0] == case.said[row]


def test_beams(case: Case, handle: Handle) -> None:
    cached = generate(case.model, case.rows, num_beams=3)
    assert cached == generate(case.model, case.rows, num_beams=3, use_cache=False)
    for target, found in zip(TARGETS, cached, strict=False):
        assert tuple(found[: len(target)]) == target


def test_sampling(case: Case, handle: Handle) -> None:
    def sample(**options: Any) -> list[list[int]]:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            return generate(case.model, case.rows, do_sample=True, temperature=1.0, top_k=0, **options)

    assert sample() == sample(use_cache=False)
    assert len({tuple(row) for row in sample()}) == len(case.rows)


def test_manual_cached_loop(case: Case, handle: Handle) -> None:
    """Without `generate`, the prompt fed in two pieces."""
    for row, said in zip(case.rows, case.said, strict=True):
        cache, ids = DynamicCache(config=case.model.config), list(row)
        pieces = [row[: len(row) // 2], row[len(row) // 2 :]]
        for piece in pieces:
            with torch.no_grad():
                logits = case.model(torch.tensor([piece]), **with_cache(case.model, cache)).logits[0, -1]
        for _ in range(NEW):
            ids.append(int(logits.argmax()))
            with torch.no_grad():
                logits = case.model(torch.tensor([ids[-1:]]), **with_cache(case.model, cache)).logits[0, -1]
        assert ids[len(row) :] == said


def test_manual_cached_loop_over_a_padded_batch(case: Case, handle: Handle) -> None:
    batch = pad(case.rows, 0, side="left")
    mask, places, cache = batch.mask, batch.position_ids, None
    ids, found = batch.ids, torch.empty(len(case.rows), 0, dtype=torch.long)
    for _ in range(NEW):
        with torch.no_grad():
            out = case.model(input_ids=ids, attention_mask=mask, position_ids=places, **with_cache(case.model, cache))
        cache, ids, places = cache_in(out), out.logits[:, -1:].argmax(-1), places[:, -1:] + 1
        mask, found = torch.cat([mask, torch.ones_like(ids)], 1), torch.cat([found, ids], 1)
    assert found.tolist() == case.said


def test_right_padded_chunks(case: Case, handle: Handle) -> None:
    """A second chunk of which some rows have nothing but padding: short rows wait for long ones."""
    batch, half = pad(case.full, 0), min(map(len, case.full))
    out, logits = None, []
    for columns in (slice(0, half), slice(half, None)):
        with torch.no_grad():
            out = case.model(
                input_ids=batch.ids[:, columns],
                attention_mask=batch.mask[:, : columns.stop],
                **with_cache(case.model, cache_in(out)),
            )
        logits.append(out.logits)
    check_against_oracle(case, torch.cat(logits, 1))


def test_teacher_forcing_right_padded(case: Case, handle: Handle) -> None:
    batch = pad(case.full, 0)
    with torch.no_grad():
        logits = case.model(**batch.inputs(case.model), use_cache=False).logits
    check_against_oracle(case, logits)


def check_against_oracle(case: Case, logits: Tensor) -> None:
    for i, (ids, expected) in enumerate(zip(case.full, case.logits, strict=True)):
        # float32 rounding of two batch shapes; steered logits are around 40
        torch.testing.assert_close(logits[i, : len(ids)], expected, atol=2e-3, rtol=1e-4)
        prompt = len(case.rows[i])
        assert logits[i, prompt - 1 : len(ids) - 1].argmax(-1).tolist() == case.said[i]


def test_steering_ends_with_the_object(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    """Nothing but the object's own positions is moved (an inner site's changes stay in the context of later ones)."""
    if case.parts[0].gate.cues is not None:
        pytest.skip("what is said behind the object may by chance ask for it again")
    for row, ids in enumerate(case.full[: len(PROMPTS)]):
        start, length = len(case.rows[row]) - 1, len(case.parts[row].maps)
        assert case.steered[row] == list(range(start, start + length))
        with torch.no_grad():
            plain = case.model(torch.tensor([ids]), use_cache=False).logits[0]
            with case.attach(tokenizer):
                found = case.model(torch.tensor([ids]), use_cache=False).logits[0]
        assert torch.equal(found[:start], plain[:start])
        assert not found[start : start + length].eq(plain[start : start + length]).all(-1).any()
        if case.parts[0].site == "final":
            assert torch.equal(found[start + length :], plain[start + length :])


def test_rows_have_edits_of_their_own(
    case: Case, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each row one edit competes: its own, or one that is about another row's prompt; in one row none."""
    n, hooks = len(case.parts), hooks_of(case.model)
    chosen = ([0, 1, 3, 2, 0, 1, 2, 3, n] * 2)[: len(case.rows)]
    patches = [patch_of(case.model, tokenizer, (part,)) for part in case.parts]
    own = [case.parts[c : c + 1] for c in chosen]
    said = [
        loop(lambda ids, own=own: oracle(case.model, own, ids), row) for row, own in zip(case.rows, own, strict=True)
    ]
    with attach_rows(case.model, tokenizer, [patches[c] if c < n else None for c in chosen]):
        assert generate(case.model, case.rows) == said
        assert generate(case.model, case.rows, use_cache=False) == said
        monkeypatch.setattr(Memory, "SIZE", 1)
        assert generate(case.model, case.rows, max_new_tokens=3) == [text[:3] for text in said]
    same = [mine == all_ for mine, all_ in zip(said, case.said, strict=True)]
    assert hooks_of(case.model) == hooks
    if case.parts[0].gate.cues is None:
        assert same == [True, True, False, False, *[True] * 5]


def test_forgetting_costs_a_pass_never_an_answer(case: Case, handle: Handle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "SIZE", 1)
    assert generate(case.model, case.rows[:4]) == case.said[:4]


def test_out_of_scope_rows_keep_their_bits(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    """In the same mixed batch: a whole pass on either padding side, and every step of a cached generation."""
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW, "do_sample": False}
    left, right = pad(case.rows, 0, side="left"), pad(case.rows, 0)

    def run() -> list[Tensor]:
        with torch.no_grad():
            whole = [case.model(**b.inputs(case.model)).logits for b in (left, right)]
            stepwise = case.model.generate(input_ids=left.ids, attention_mask=left.mask, **options).logits
        return [*whole, *stepwise]

    plain = run()
    with case.attach(tokenizer):
        steered = run()
    for before, after in zip(plain, steered, strict=True):
        assert torch.equal(before[case.outside], after[case.outside])
    assert not torch.equal(plain[0], steered[0]) and not torch.equal(plain[2], steered[2])
    for before, after in zip(plain, run(), strict=True):
        assert torch.equal(before, after)  # detached


def test_interrupt_leaves_the_table_usable(case: Case, tokenizer: PreTrainedTokenizerFast) -> None:
    model = case.model
    last = anatomy(model).module(model, anatomy(model).site(-1))
    rows, calls = case.rows[:3], []
    before, whole = hooks_of(model), torch.tensor([case.rows[0]])
    with torch.no_grad():
        plain = model(whole).logits

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with case.attach(tokenizer):
        for error in (KeyboardInterrupt, RuntimeError):
            calls.clear()
            hook = last.register_forward_hook(interrupt if error is KeyboardInterrupt else _fail)
            with pytest.raises(error):
                generate(model, rows)
            hook.remove()
            assert generate(model, rows) == case.said[:3]
    assert hooks_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(whole).logits, plain)


def _fail(*_: Any) -> None:
    raise RuntimeError("no memory")


# -- several at once ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> PreTrainedModel:
    found = tiny_model("gpt2", layers=3)
    found.generation_config.eos_token_id = None
    found.generation_config.pad_token_id = 0
    return found


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_gates_and_sites_of_all_kinds_act_together(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, order: tuple[int, int]
) -> None:
    """Gates of their own; one edit acts inside the model, below the layer that the other one's gate reads."""
    inner = steering_part(model, PROMPTS[1], TARGETS[1], gate=Gate(layers=(0,)), site=0)
    outer = steering_part(model, PROMPTS[2], TARGETS[2], gate=Gate(layers=(1,), pooling="mean"))
    parts = [(inner, outer)[i] for i in order]
    with patch_of(model, tokenizer, tuple(parts)).attach(model, tokenizer):
        found = generate(model, [list(PROMPTS[1]), list(PROMPTS[2])])
        alone = [generate(model, [list(PROMPTS[i])])[0] for i in (1, 2)]
    assert found == alone
    assert tuple(found[0][:2]) == TARGETS[1] and tuple(found[1][:3]) == TARGETS[2]


def test_a_gate_above_its_site_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """The decision would come after the place where it is needed: such an edit could never act."""
    part = steering_part(model, PROMPTS[0], TARGETS[0], gate=Gate(layers=(2,)), site=0)
    before = hooks_of(model)
    with pytest.raises(EditError, match="layer"):
        patch_of(model, tokenizer, (part,)).attach(model, tokenizer)
    assert hooks_of(model) == before


def test_handles_add_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    gate = Gate(layers=(1,))
    parts = [steering_part(model, p, t, gate=gate) for p, t in zip(PROMPTS, TARGETS, strict=True)]
    rows, batch = [list(p) for p in PROMPTS], pad(PROMPTS, 0)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(**batch.inputs(model)).logits

    plain = logits()
    with patch_of(model, tokenizer, tuple(parts)).attach(model, tokenizer):
        together, said = logits(), generate(model, rows)
    handles = [patch_of(model, tokenizer, (part,)).attach(model, tokenizer) for part in parts]
    assert torch.equal(logits(), together) and generate(model, rows) == said
    for gone in (1, 3, 0, 2):
        handles[gone].detach()
        handles[gone].detach()  # twice is harmless
    assert torch.equal(logits(), plain) and hooks_of(model) == [] and "_errata_steering" not in vars(model)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_under_a_gate_that_stays_open_the_object_is_said_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pooling: Pooling
) -> None:
    part = steering_part(model, PROMPTS[1], TARGETS[1], gate=Gate(layers=(0, 1), pooling=pooling), radius=1e4)
    said = [loop(lambda ids: oracle(model, (part,), ids), p) for p in (PROMPTS[1], PROMPTS[2])]
    after = [loop(lambda ids: oracle(model, (), ids), [*p, *TARGETS[1]], NEW - 2) for p in (PROMPTS[1], PROMPTS[2])]
    assert said == [[*TARGETS[1], *rest] for rest in after]
    with patch_of(model, tokenizer, (part,)).attach(model, tokenizer):
        for options in ({}, {"use_cache": False}):
            assert generate(model, [list(PROMPTS[1]), list(PROMPTS[2])], **options) == said
        for row, expected in ((PROMPTS[1], said[0]), (PROMPTS[2], said[1])):
            with torch.no_grad():
                logits = model(torch.tensor([[*row, *expected]]), use_cache=False).logits[0]
            assert logits[len(row) - 1 : -1].argmax(-1).tolist() == expected


def test_reading_below_an_attached_patch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """`states_at` ends the forward pass as soon as it can; the table takes no harm."""
    inner = steering_part(model, PROMPTS[1], TARGETS[1], gate=Gate(layers=(0,), pooling="mean"), site=0)
    outer = steering_part(model, PROMPTS[2], TARGETS[2], gate=Gate(layers=(1,), pooling="mean"))
    with patch_of(model, tokenizer, (inner, outer)).attach(model, tokenizer):
        said = generate(model, [list(PROMPTS[2])])
        for site in (0, 1, "final"):
            states_at(model, [list(PROMPTS[2]), list(PROMPTS[1])], [[-1], [-1]], [site])
        assert generate(model, [list(PROMPTS[2])]) == said


def test_decide_says_which_edit_and_how_far(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    near, far = "The capital of France is", "The capital of Japan is"
    gate = Gate(layers=(1,))
    parts = tuple(
        steering_part(model, tokenizer(text)["input_ids"], (70,), gate=gate, edit=text) for text in (near, far[:-3])
    )
    with patch_of(model, tokenizer, parts).attach(model, tokenizer) as handle:
        here, there = handle.decide([near, far])
    assert (here.edit, here.nearest, here.radius) == (near, near, parts[0].radius)
    assert here.distance < 1e-4
    assert there.edit is None and there.nearest in (near, far[:-3])
    points = prefix_points(model, tokenizer(far)["input_ids"], gate)[-1]
    assert there.distance == pytest.approx(min(float((points - p.centre).norm()) for p in parts), rel=1e-4)


# -- what cannot be known is refused -----------------------------------------------------------------------------------


def test_embeddings_unknown_caches_and_half_a_mask_are_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    part = steering_part(model, PROMPTS[0], TARGETS[0], gate=Gate(layers=(0,)))
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        foreign = cache_in(model(ids, use_cache=True))
        vectors = model.get_input_embeddings()(ids)
    with torch.no_grad(), patch_of(model, tokenizer, (part,)).attach(model, tokenizer):
        with pytest.raises(EditError, match="input_ids"):
            model(inputs_embeds=vectors)
        with pytest.raises(EditError, match="input_ids"):
            model.generate(inputs_embeds=vectors, max_new_tokens=2)
        with pytest.raises(EditError, match="never seen"):
            model(torch.tensor([[70]]), **with_cache(model, foreign))
        own = cache_in(model(ids, use_cache=True))
        with pytest.raises(EditError, match="attention mask"):
            model(torch.tensor([[70]]), **with_cache(model, own), attention_mask=torch.ones(1, 1, dtype=torch.long))
        assert tuple(generate(model, [list(PROMPTS[0])])[0][:1]) == TARGETS[0]  # still in working order


# -- encoder gates -----------------------------------------------------------------------------------------------------


class FakeEncoder:
    """Texts as points on a line: 0 for texts that the rule accepts, far away for others."""

    def __init__(self, rule: Any):
        self.rule, self.asked = rule, []

    def encode(self, texts: list[str]) -> Tensor:
        self.asked += list(texts)
        return torch.tensor([[0.0 if self.rule(text) else 9.0, 1.0] for text in texts])


TEXT = "The capital of France is"
OBJECT = " Goa"


def encoded_part(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Steering:
    target = tuple(tokenizer(OBJECT)["input_ids"])
    assert len(target) > 1
    centre = torch.tensor([0.0, 1.0])
    return steering_part(
        model, tokenizer(TEXT)["input_ids"], target, gate=Gate(encoder="fake"), centre=centre, radius=1.0
    )


def encoders() -> dict[str, Any]:
    """One opens at the prompt only; others, as real encoders do, also while the object is being said and afterwards."""
    return {
        "exact": lambda text: text == TEXT,
        "loose": lambda text: text.startswith(TEXT) and OBJECT not in text,
        "looser": lambda text: text.startswith(TEXT),
    }


@pytest.fixture(params=encoders())
def encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    fake = FakeEncoder(encoders()[request.param])
    monkeypatch.setattr("errata.scope.encoder.load_encoder", lambda name: fake)
    return fake


def test_encoder_gate_decides_where_the_next_token_is_wanted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, encoder: FakeEncoder
) -> None:
    part = encoded_part(model, tokenizer)
    inside, outside = tokenizer(TEXT)["input_ids"], tokenizer("The capital of Japan is that of")["input_ids"]
    plain = generate(model, [inside, outside])
    n = len(part.target_ids)
    with patch_of(model, tokenizer, (part,)).attach(model, tokenizer) as handle:
        cached = generate(model, [inside, outside])
        assert tuple(cached[0][:n]) == part.target_ids and cached[1] == plain[1]
        assert generate(model, [inside])[0] == cached[0]
        assert generate(model, [inside, outside], use_cache=False) == cached
        with torch.no_grad():
            by_hand = loop(lambda ids: model(torch.tensor([ids]), use_cache=False).logits[0], inside)
        assert by_hand == cached[0]
        once = generate(model, [[*inside, *part.target_ids]])[0]
        assert handle.decide([TEXT, "The capital"])[0].edit == part.edit
    assert cached[0][n:] == generate(model, [[*inside, *part.target_ids]])[0][: NEW - n] == once[: NEW - n]  # said once


def test_encoder_gate_under_teacher_forcing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, encoder: FakeEncoder
) -> None:
    part = encoded_part(model, tokenizer)
    inside, outside = tokenizer(TEXT)["input_ids"], tokenizer("The capital of Japan is that of")["input_ids"]
    with patch_of(model, tokenizer, (part,)).attach(model, tokenizer) as handle:
        said = generate(model, [inside, outside])
        full = [inside + said[0], outside + said[1]]
        encoder.asked.clear()
        for side in ("right", "left"):
            batch = pad(full, 0, side=side)  # type: ignore[arg-type]
            with torch.no_grad(), handle.prompts([len(inside), len(outside)]):
                logits = model(**batch.inputs(model), use_cache=False).logits
            for row, prompt in enumerate((inside, outside)):
                real = batch.mask[row].nonzero()[:, 0]
                at = real[len(prompt) - 1 : -1]
                assert logits[row, at].argmax(-1).tolist() == said[row]
        assert all(len(text) >= len(TEXT) for text in encoder.asked)  # prompts' insides were never embedded
        with torch.no_grad(), handle.prompts([len(inside)]):
            step = model(torch.tensor([inside])).logits[0, -1]
            whole = model(torch.tensor([full[0]])).logits[0, len(inside) - 1]
        torch.testing.assert_close(step, whole, atol=2e-3, rtol=1e-4)
    assert all(a != b for a, b in pairwise(said)) and isinstance(handle, AbstractContextManager)


def test_of_two_classifiers_the_surer_one_wins(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """A plane w·z > b is sure by its margin, not by w·z; and one that is barely open yields to a ball's heart."""
    prompt = tokenizer("The Space Needle is")["input_ids"]
    gate = Gate(layers=(0,), distance="linear")
    z = prefix_points(model, prompt, Gate(layers=(0,)))[-1]
    w = z / z.square().sum()  # w·z = 1

    def plane(height: float, margin: float, edit: str) -> Steering:
        return steering_part(
            model, prompt, (5,), gate=gate, centre=height * w, radius=margin - height, edit=edit, key=edit
        )

    ball = steering_part(model, prompt, (6,), gate=Gate(layers=(0,)), centre=z, radius=0.5, edit="ball", key="ball")
    table = SteeringTable(model, tokenizer)
    for parts, winner in (
        ((plane(5.0, 0.1, "loud"), plane(3.0, 7.0, "sure")), "sure"),
        ((plane(5.0, 0.1, "loud"), ball), "ball"),
    ):
        owner = object()
        table.add(owner, parts)
        [decision] = table.decide(["The Space Needle is"])
        table.remove(owner)
        assert decision.edit == winner


def test_a_refused_attach_leaves_the_model_as_it_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    late = steering_part(model, [5, 6], (5,), gate=Gate(layers=(1,)), site=0)
    table = SteeringTable.on(model, tokenizer)
    with pytest.raises(EditError, match="comes later"):
        table.add(object(), [late])
    assert "_errata_steering" not in model.__dict__
