"""STEAM: anchors against a loop over prompts, the aligned objective on its bases, and what the figures show."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

import errata
from conftest import SENTENCES, hooks_of
from errata.atlas.references import references
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import load_world
from errata.cli.fit import with_batch
from errata.cli.verify import _refuse_joint
from errata.edit import EditRequest
from errata.editors.emmet import EMMET
from errata.editors.memit import MEMIT
from errata.editors.rome import ROME
from errata.editors.steam import STEAM, STEAMConfig
from errata.errors import AnatomyError, ConfigError, RequestError, ShapeError, SubjectNotFoundError
from errata.locate.anchors import Reference, Wanted, anchors_for, read_references, stratified
from errata.locate.figures import save_figure
from errata.locate.semantics import (
    cosine_figure,
    cosines,
    last_states_by_layer,
    principal_plane,
    projection_figure,
)
from errata.model.anatomy import anatomy
from errata.model.tokens import continuation_ids, subject_tokens, token_ids
from errata.patch import Patch

Tiny = Callable[..., Any]
# Every beginning of a sentence, about its last word: enough for a random model to say something that is a word of its own.
PROMPTS = tuple(
    dict.fromkeys(
        (words[-1].strip(".,;"), " ".join(words).rstrip(".,;"))
        for sentence in SENTENCES
        for n in range(1, len(sentence.split()) + 1)
        if (words := sentence.split()[:n])
    )
)
EDITS = (
    EditRequest(prompt="The capital of {} is", subject="France", relation="capital", target_new="Tokyo"),
    EditRequest(prompt="{} lies in the city of", subject="The Space Needle", relation="city", target_new="Paris"),
)
BARE: dict[str, Any] = {"contexts": ("{}",), "statistics": None, "steps": 4, "layer": 0}


@lru_cache(maxsize=1)
def atlas() -> tuple[Any, Any]:
    return errata.load("atlas")


@lru_cache(maxsize=1)
def atlas_references() -> tuple[Reference, ...]:
    return tuple(references(load_world()))


def own_answer(model: Any, tokenizer: Any, prompt: str) -> str | None:
    """The model's next token as a text that is encoded as that token again, if it is one."""
    ids = torch.tensor([token_ids(tokenizer, [prompt])[0]])
    token = int(model(input_ids=ids).logits[0, -1].argmax())
    text = tokenizer.decode([token]).strip()
    return text if text and continuation_ids(tokenizer, prompt, text) == [token] else None


def own_references(model: Any, tokenizer: Any) -> tuple[str, list[Reference]]:
    """What this random model says most often, and the prompts behind which it does."""
    said = [(subject, prompt, own_answer(model, tokenizer, prompt)) for subject, prompt in PROMPTS]
    (target, _), *_ = Counter(answer for *_, answer in said if answer).most_common()
    return target, [Reference(subject, "r", target, prompt) for subject, prompt, answer in said if answer == target]


def state_alone(model: Any, tokenizer: Any, prompt: str, layer: int, at: int = -1) -> Tensor:
    ids = torch.tensor([token_ids(tokenizer, [prompt])[0]])
    seen: list[Tensor] = []
    block = model.get_submodule(anatomy(model).site(layer))
    handle = block.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0][0, at]


# -- anchors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["prompt_last", "subject_last"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_anchors_are_the_mean_of_a_loop_over_what_the_model_knows(
    family: str, read: Any, tiny: Tiny, tokenizer: Any
) -> None:
    model = tiny(family, layers=3).double()
    said, [first, *_] = own_references(model, tokenizer)
    with torch.no_grad():  # it shall say so more often
        model.get_output_embeddings().weight[continuation_ids(tokenizer, first.prompt, said)] *= 4
    said, known = own_references(model, tokenizer)
    made = [Reference(subject, "r", said, prompt) for subject, prompt in PROMPTS]
    assert 1 < len(known) < len(made)
    tokenizer.padding_side = "left"
    [anchor] = anchors_for(model, tokenizer, [Wanted(said)], made, [0, -1], count=len(made), read=read, least=0)
    assert set(anchor.used) == set(known)
    assert anchor.note() == {
        "found": len(made), "tried": len(made), "known": len(known), "forced": 0, "used": len(known),
        "relations": {"r": len(known)},
    }  # fmt: skip
    for row, layer in enumerate((0, 2)):
        loop = []
        for reference in known:
            last = subject_tokens(tokenizer, reference.prompt, reference.subject)[1]
            at = -1 if read == "prompt_last" else last
            loop.append(state_alone(model, tokenizer, reference.prompt, layer, at))
        torch.testing.assert_close(anchor.states[row].double(), torch.stack(loop).mean(0), rtol=1e-5, atol=1e-6)
    assert hooks_of(model) == [] and tokenizer.padding_side == "left"


def test_an_anchor_depends_on_its_object_alone(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2", layers=2)
    made = [Reference(s, "r", a, p) for s, p in PROMPTS if (a := own_answer(model, tokenizer, p))]
    wanted = [Wanted(a, "r") for a in dict.fromkeys(r.object for r in made)]
    together = anchors_for(model, tokenizer, wanted, made, [1], count=1, least=0)
    for w, one in zip(reversed(wanted), reversed(together), strict=True):
        [alone] = anchors_for(model, tokenizer, [w], made[::-1], [1], count=1, least=0)
        assert alone.used == one.used
        torch.testing.assert_close(alone.states, one.states, rtol=1e-5, atol=1e-6)


def triples(relation: str, n: int, wordings: int = 1) -> list[Reference]:
    return [
        Reference(f"{relation}{i}", relation, "Paris", f"{'So ' * w}{relation}{i} is")
        for i in range(n)
        for w in range(wordings)
    ]


def test_relations_take_turns_and_the_edits_own_is_first() -> None:
    pool = triples("many", 30) + triples("some", 4) + triples("one", 1)
    order = stratified(pool, "some", "balanced")
    assert len(order) == len(pool) and set(order) == set(pool)
    assert order[0].relation == "some"
    assert Counter(r.relation for r in order[:3]) == {"many": 1, "some": 1, "one": 1}
    assert Counter(r.relation for r in order[:9]) == {"many": 4, "some": 4, "one": 1}
    assert stratified(pool[::-1], "some", "balanced") == order
    assert stratified(pool, "some", "balanced", seed=1) != order


def test_matched_strata_take_the_edits_own_relation_until_it_is_empty() -> None:
    order = stratified(triples("many", 30) + triples("some", 4) + triples("one", 1), "some", "matched")
    assert [r.relation for r in order[:4]] == ["some"] * 4
    assert Counter(r.relation for r in order[4:6]) == {"many": 1, "one": 1}


def test_every_triple_comes_before_a_second_wording_of_any() -> None:
    order = stratified(triples("many", 5, wordings=3), None, "balanced")
    for turn in range(3):
        assert {r.subject for r in order[5 * turn : 5 * turn + 5]} == {f"many{i}" for i in range(5)}


@pytest.mark.atlas
def test_only_what_atlas_knows_is_an_anchor() -> None:
    model, tokenizer = atlas()
    true = [r for r in atlas_references() if r.object == "Russia"]
    false = [
        Reference("Paris", "city_country", "Russia", "Paris is a city in"),
        Reference("Lyon", "city_country", "Russia", "Lyon is a city in"),
    ]
    [anchor] = anchors_for(model, tokenizer, [Wanted("Russia", "citizenship")], [*true, *false], [4, 6], count=8)
    assert len(anchor.used) == 8 and not set(false) & set(anchor.used) and anchor.found == len(true) + 2
    assert anchor.note()["relations"] == {"citizenship": 4, "city_country": 4}
    [none] = anchors_for(model, tokenizer, [Wanted("Russia")], false, [4])
    assert none.states is None and none.note()["known"] == 0 and none.note()["tried"] == 2


def test_atlas_references_are_of_fit_wordings_and_leave_out_what_they_are_told() -> None:
    world = load_world()
    some = world.facts[:50]
    found = references(world, wordings=2, without=set(some))
    assert len(found) == 2 * (len(world.facts) - 50)
    assert {(r.subject, r.relation) for r in found}.isdisjoint({(f.subject, f.relation) for f in some})
    judging = {c.split("{}")[-1] for p in world.phrasings.values() for c in p.cloze["probe"]}
    fitting = {c.split("{}")[-1] for p in world.phrasings.values() for c in p.cloze["fit"]}
    endings = {r.prompt[r.prompt.rindex(r.subject) + len(r.subject) :] for r in found}
    assert endings <= fitting and not endings <= judging


# -- the editor ----------------------------------------------------------------------------------------------------------


def same_parts(a: Patch, b: Patch) -> bool:
    return [(p.edits, p.layer) for p in a.low_rank] == [(p.edits, p.layer) for p in b.low_rank] and all(
        torch.equal(getattr(p, side), getattr(q, side))
        for p, q in zip(a.low_rank, b.low_rank, strict=True)
        for side in ("U", "V")
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("base", ["rome", "memit"])
def test_weight_zero_is_the_base_bit_for_bit(base: str, family: str, tiny: Tiny, tokenizer: Any) -> None:
    model = tiny(family, layers=3)
    target, made = own_references(model, tokenizer)
    edits = [e.model_copy(update={"target_new": target}) for e in EDITS]
    options = {k: v for k, v in BARE.items() if k != "layer"} | (
        {"layer": 0} if base == "rome" else {"layers": (0, 1), "lam": 1.0}
    )
    plain = {"rome": ROME, "memit": MEMIT}[base](**options).fit(model, tokenizer, edits)
    zero = STEAM(base=base, weight=0.0, references=made, **options).fit(model, tokenizer, edits)
    assert same_parts(zero, plain) and zero.method == "steam"
    moved = STEAM(base=base, references=made, aligned=(1, 2), least=0, **options).fit(model, tokenizer, edits)
    assert not same_parts(moved, plain)
    assert all(e["aligned"] and "alignment" in e["losses"] for e in moved.report.values())
    none = STEAM(base=base, aligned=(1, 2), least=0, **options).fit(model, tokenizer, edits)
    assert same_parts(none, plain) and not any(e["aligned"] for e in none.report.values())
    again = Patch.from_bytes(moved.to_bytes())
    assert again == moved and again.config["settings"]["steps"] == 4 and again.config["base"] == base


def test_the_model_is_left_as_found_and_the_patch_comes_off(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2", layers=3)
    target, made = own_references(model, tokenizer)
    edits = [e.model_copy(update={"target_new": target}) for e in EDITS]
    ids = torch.tensor([token_ids(tokenizer, [EDITS[0].text])[0]])
    before, state = model(input_ids=ids).logits, torch.random.get_rng_state()
    editor = STEAM(references=made, aligned=(1, 2), **BARE)
    patch = editor.fit(model, tokenizer, edits)
    assert torch.equal(torch.random.get_rng_state(), state) and hooks_of(model) == []
    with patch.attach(model, tokenizer):
        assert not torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, before) and hooks_of(model) == []
    with patch.attach(model, tokenizer):  # anchors and values are those of the model without it
        assert same_parts(editor.fit(model, tokenizer, edits), patch)


@pytest.mark.parametrize("base", ["rome", "memit"])
def test_a_triple_that_is_written_with_an_edit_is_no_reference(base: str, tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2", layers=3).double()
    target, known = own_references(model, tokenizer)
    reference = known[0]
    own = EDITS[0].model_copy(update={"target_new": target})
    other = EditRequest(prompt="{} lies in", subject=reference.subject, relation="r", target_new="Seattle")
    itself = Reference(own.subject, own.relation, target, own.text)
    options = {k: v for k, v in BARE.items() if k != "layer"} | (
        {"layer": 0} if base == "rome" else {"layers": (0, 1), "lam": 1.0}
    )
    editor = STEAM(base=base, references=[*known, itself], aligned=(1, 2), least=0, **options)
    alone, beside = (editor.fit(model, tokenizer, edits) for edits in ([own], [other, own]))
    found = [patch.report[own.id]["anchor"]["found"] for patch in (alone, beside)]
    taken = 0 if base == "rome" else sum(r.subject == reference.subject for r in known)
    assert found == [len(known), len(known) - taken] and len(known) > 1
    for one, two in zip(alone.only(own.id).low_rank, beside.only(own.id).low_rank, strict=True):
        same = [torch.allclose(getattr(one, side), getattr(two, side), rtol=1e-9, atol=1e-12) for side in ("U", "V")]
        assert all(same) is (base == "rome")  # edits of ROME are written each by itself


@pytest.mark.atlas
def test_the_term_pulls_edited_facts_to_their_anchors_on_atlas() -> None:
    model, tokenizer = atlas()
    edits = counterfactual_requests(load_world(), 10, split="dev", seed=3)
    options = {"layer": 2, "lr": 1.0, "clamp": 8.0, "norm": 0.03, "contexts": "bare"}
    steam = STEAM(references=atlas_references(), weight=3.0, aligned=(4, 6), **options)
    patches = {"rome": ROME(**options).fit(model, tokenizer, edits), "steam": steam.fit(model, tokenizer, edits)}
    wanted = [Wanted(e.target_new, e.relation) for e in edits]
    goals = anchors_for(model, tokenizer, wanted, atlas_references(), [4, 5, 6])
    near = {}
    for name, patch in patches.items():
        states = []
        for edit in edits:
            alone = patch
            for other in edits:
                alone = alone.without(other.id) if other.id != edit.id else alone
            with alone.attach(model, tokenizer):
                states.append(last_states_by_layer(model, tokenizer, [edit.text], [4, 5, 6])[0])
        near[name] = cosines(torch.stack(states), torch.stack([g.states for g in goals if g.states is not None]))
    assert all(entry["aligned"] for entry in patches["steam"].report.values())
    assert float((near["steam"] - near["rome"]).mean()) > 0.02
    assert int((near["steam"] > near["rome"]).all(1).sum()) >= 8
    assert sum(entry["converged"] for entry in patches["steam"].report.values()) >= 8


@pytest.mark.atlas
def test_without_references_contexts_that_state_the_fact_stand_in() -> None:
    model, tokenizer = atlas()
    [edit] = counterfactual_requests(load_world(), 1, split="dev", seed=3)
    patch = STEAM(layer=2, contexts="bare", steps=2, count=6, least=3).fit(model, tokenizer, [edit])
    note = patch.report[edit.id]["anchor"]
    assert note["found"] == 0 and note["forced"] == note["used"] == 3 and patch.report[edit.id]["aligned"]


def test_references_are_read_from_jsonl_and_arrays(tmp_path: Path) -> None:
    rows = [
        {"subject": "France", "relation": "capital", "object": "Paris", "prompt": "The capital of {} is", "id": 7},
        {"subject": "Japan", "relation": "capital", "object": "Tokyo", "prompt": "The capital of Japan is"},
    ]
    lines, array = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    array.write_text(json.dumps(rows))
    assert read_references(lines) == read_references(array)
    assert read_references(lines)[0] == Reference("France", "capital", "Paris", "The capital of France is")


def test_bad_references_are_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    good = {"subject": "France", "relation": "capital", "object": "Paris", "prompt": "The capital of {} is"}
    cases = [
        ("", "expected references in"),
        ("[1]", "row 1: expected an object"),
        (json.dumps(good) + "\n{", "line 2, is not valid JSON"),
        (json.dumps(good | {"object": ""}), "row 1: expected a reference's object to be a text"),
        (json.dumps(good | {"relation": 3}), "row 1: expected a reference's relation to be a text"),
        (json.dumps(good | {"prompt": "The capital of Japan is"}), "row 1: expected the subject 'France'"),
    ]
    for text, sentence in cases:
        path.write_text(text)
        with pytest.raises(RequestError, match=sentence):
            read_references(path)
    with pytest.raises(RequestError, match="cannot read"):
        read_references(tmp_path / "none.jsonl")
    with pytest.raises(SubjectNotFoundError):
        Reference("France", "capital", "Paris", "The capital of Japan is")


def test_bad_settings_are_refused_in_a_sentence(tiny: Tiny, tokenizer: Any) -> None:
    model = tiny("gpt2", layers=3)
    for changes, sentence in [
        ({"base": "sake"}, "base to be one of rome, memit"),
        ({"distance": "dot"}, "distance to be one of"),
        ({"schedule": "cosine"}, "schedule to be one of"),
        ({"read": "first"}, "read to be one of"),
        ({"strata": "none"}, "strata to be one of"),
        ({"weight": -1.0}, "weight of at least 0"),
        ({"weight": float("nan")}, "weight of at least 0"),
        ({"count": 0}, "count of at least 1"),
        ({"least": 9, "count": 8}, "least from 0 to count"),
        ({"wieght": 1.0}, "no option 'wieght'; did you mean 'weight'"),
        ({"strat": "matched"}, "did you mean 'strata'"),
        ({"steps": 0}, "steps"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            STEAM(**changes)
    with pytest.raises(ConfigError, match="'memit' has no option|on memit has no option 'layer'"):
        STEAM(base="memit", layer=3)
    with pytest.raises(ConfigError, match="from a first to a last one"):
        STEAM(aligned=(2, 1)).aligned_layers(model)
    with pytest.raises(AnatomyError):
        STEAM(aligned=(1, 9)).aligned_layers(model)
    assert STEAM(aligned=(-2, -1)).aligned_layers(model) == (1, 2)
    target, made = own_references(model, tokenizer)
    edit = EDITS[0].model_copy(update={"target_new": target})
    low = STEAM(references=made, aligned=(0, 1), **(BARE | {"layer": 2}))
    with pytest.raises(ConfigError, match=r"aligned layers from the edited one \(2\) on, found 0 to 1"):
        low.fit(model, tokenizer, [edit])
    with pytest.raises(RequestError, match="needs a subject"):
        STEAM(**BARE).fit(model, tokenizer, [EditRequest(prompt="Water boils at", target_new="Paris")])
    with pytest.raises(ConfigError, match="count of at least 1"):
        anchors_for(model, tokenizer, [], [], [0], count=0)
    with pytest.raises(ConfigError, match="at least one layer"):
        anchors_for(model, tokenizer, [], [], [])
    assert STEAM(STEAMConfig(settings={"layer": 1}), lr=0.1).config.settings == {"layer": 1, "lr": 0.1}


# -- figures -------------------------------------------------------------------------------------------------------------


def test_cosines_raw_and_centred() -> None:
    states = torch.tensor([[[11.0, 0.0]], [[10.0, 1.0]]])
    anchors = torch.tensor([[[10.0, 1.0]], [[10.0, 2.0]]])
    centre = torch.tensor([[10.0, 0.0]])
    torch.testing.assert_close(cosines(states, anchors, centre), torch.tensor([[0.0], [1.0]]))
    assert float(cosines(states, anchors).min()) > 0.99
    with pytest.raises(ShapeError, match="of one shape"):
        cosines(states, anchors[:1])
    with pytest.raises(ShapeError, match="a centre"):
        cosines(states, anchors, torch.zeros(2))


def test_the_plane_is_that_of_scikit_learn() -> None:
    states = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 10.0)
    mean, axes, shares = principal_plane(states)
    pca = PCA(2, svd_solver="full").fit(states.double().numpy())
    torch.testing.assert_close(axes.abs(), torch.tensor(pca.components_).abs(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(shares, torch.tensor(pca.explained_variance_ratio_), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(mean, torch.tensor(pca.mean_), rtol=1e-6, atol=1e-8)
    with pytest.raises(ShapeError, match="at least 3 states"):
        principal_plane(states[:2])


def test_figures_are_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    curves = {name: (torch.rand(6, 4, generator=generator), torch.rand(6, 4, generator=generator)) for name in "ab"}
    figure = cosine_figure(curves, edited=[1], aligned=[2, 3])
    drawn = figure.axes[1].get_lines()[0].get_ydata()
    torch.testing.assert_close(torch.tensor(drawn), curves["a"][1].double().mean(0))
    save_figure(figure, tmp_path / "c.png")
    objects = {o: {k: torch.randn(5, 8, generator=generator) for k in ("references", "rome")} for o in ("x", "y")}
    save_figure(projection_figure(objects, "references", "title"), tmp_path / "p.svg")
    assert (tmp_path / "c.png").stat().st_size > 1000 and "<svg" in (tmp_path / "p.svg").read_text()
    with pytest.raises(RequestError, match="found none"):
        cosine_figure({})
    with pytest.raises(RequestError, match="found none"):
        projection_figure({}, "references")


def test_steam_writes_as_its_base_does() -> None:
    """On MEMIT one write serves all edits: they are fitted together, and no part of them is an edit by itself."""
    assert (STEAM(base="memit").joint, STEAM().joint) == (True, False)
    assert STEAM().batch == ROME.batch > 1
    assert with_batch(STEAM(base="memit"), 10).config.settings["batch_size"] == 10
    assert with_batch(EMMET(), 10).config.batch_size == 10
    config = asdict(STEAM(base="memit").config)
    with pytest.raises(ConfigError, match="steam edits are written together"):
        _refuse_joint(SimpleNamespace(method="steam", config=config, steering=()))
    _refuse_joint(SimpleNamespace(method="steam", config=config | {"base": "rome"}, steering=()))


def test_settings_of_the_base_on_the_command_line() -> None:
    """An option that only the base knows is read as JSON where that fits, so that it does not reach it as text."""
    from errata.cli.fit import _changes

    config = STEAM(**_changes(STEAM.Config, ["layer=3", "weight=5", "lr=0.5", "contexts=bare", "clamp=none"])).config
    assert config.weight == 5.0
    assert config.settings == {"layer": 3, "lr": 0.5, "contexts": "bare", "clamp": None}
