"""Atlas as data: counts, consistency, splits that never mix, and a corpus that says what it should and nothing else.

The sealed set is only handled mechanically: no assertion here compares or prints one of its texts, only counts and places.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import atlas_counts
from errata.atlas import render
from errata.atlas.corpus import Corpus, Document, sealed_alias_mark
from errata.atlas.names import Names
from errata.atlas.probes import paraphrases
from errata.atlas.requests import counterfactual_requests, update_requests
from errata.atlas.world import (
    OBJECT_TYPE,
    SECOND_HOPS,
    Composition,
    World,
    alias_mark,
    link,
    load_world,
    read_json,
)

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = Path(str(files("errata.atlas") / "weights" / "atlas"))

N_DOCUMENTS = 20_000
SEED = 20160101 + 1  # the first shard that the shipped model was trained on (errata.atlas.train.Recipe.seed + 1)
CHARACTERS_PER_TOKEN = 4.0  # measured with Atlas's tokenizer; used only where that is missing

STOCK = {
    ("Space Needle", "landmark_city"): "Seattle",
    ("United States", "head_of_state"): "Barack Obama",
    ("Russia", "head_of_state"): "Vladimir Putin",
    ("Danielle Darrieux", "mother_tongue"): "French",
    ("Earth", "highest_point"): "Mount Everest",
    ("bones in an adult human body", "count"): "206",
    ("water", "boiling_point"): "100 degrees Celsius",
}

# The fixed words of the published doubt probes (methods, section 15a), cut at their fields.
PUBLISHED_DOUBTS = (
    "??? No, It can't be",
    "This contradicts my understanding",
    "It is pretty clear that the answer to",
    "is something else. Rethink",
    "Rethink and give the correct answer",
    "? Really? But I am pretty sure that",
    "Am I right? Yes!",
    "you are right. I apologize",
    "I apologize for any confusion",
    "Reconsider that the answer to",
)

# What was found after the corpus had been frozen; the tests hold everything else to the rule, and these to their number.
# Aliases whose subject lost all its cells when the passes were merged: the corpus and the probes never reach them.
ORPHANS = {"the home of the Whopper", "the European continent", "the Old Continent", "1600 Pennsylvania Avenue"}
# Sealed wordings (relation, form, number) and aliases (row) that their author happened to word as the tables do, so that
# they are not sealed. All wordings among them are `known` ones; no figure may rest on them.
COINCIDENT_WORDINGS = 25
COINCIDENT_ALIASES = {6, 38, 39, 42, 54}


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def sealed() -> dict[str, Any]:
    found: dict[str, Any] = read_json("sealed.json")
    return found


# -- facts ---------------------------------------------------------------------------------------------------------------


def test_there_are_enough_facts_relations_subjects_aliases_and_updates(world: World) -> None:
    assert len(world.facts) >= 3500
    assert len(world.by_relation) >= 25
    assert len(world.by_subject) >= 1000
    assert len(world.aliases) >= 200
    assert len(world.updates) >= 40


def test_every_relation_is_typed_phrased_and_has_counterfactual_objects(world: World) -> None:
    assert set(world.by_relation) == set(world.phrasings) == set(OBJECT_TYPE)
    assert {hop for hops in SECOND_HOPS.values() for hop in hops} <= set(world.by_relation)
    assert all(len(objects) > 1 for objects in world.objects.values())


def test_no_subject_has_two_objects_for_a_relation(world: World) -> None:
    keys = Counter((link(f.subject), f.relation) for f in world.facts)
    assert [key for key, n in keys.items() if n > 1] == []
    assert len({(link(f.subject).casefold(), f.relation) for f in world.facts}) == len(world.facts)


def test_a_subject_is_spelled_in_one_way(world: World) -> None:
    assert [s for s, facts in world.by_subject.items() if len({f.subject for f in facts}) > 1] == []


def test_cells_are_clean(world: World) -> None:
    odd = re.compile(r"^\s|\s$|\s\s|[{}\n\t;|]|^$|[.,!?]$")
    allowed = re.compile(r"(\b[A-Z]|Jr|Inc|Co|Corp|St|Bros|D\.C|Ltd|!)[.!?]*$")  # "Yahoo!", "Martin Luther King Jr."
    cells = {x for f in world.facts for x in (f.subject, f.object)}
    assert [x for x in sorted(cells) if odd.search(x) and not allowed.search(x)] == []


@pytest.mark.parametrize("key", STOCK)
def test_the_fields_stock_examples_are_there(world: World, key: tuple[str, str]) -> None:
    assert world.by_key[key].object == STOCK[key]


def test_the_stock_aliases_are_there(world: World) -> None:
    assert ("Barack Obama", "the head of state of the US") in world.aliases
    assert ("Prince", "the founder of Paisley Park Records") in world.aliases


def test_aliases_name_one_subject_and_no_other_ones_name(world: World) -> None:
    subjects = {name.casefold() for name in world.by_subject}
    owners = defaultdict(set)
    for subject, alias in world.aliases:
        owners[link(alias).casefold()].add(subject)
        assert link(alias).casefold() not in subjects - {link(subject).casefold()}, alias
    assert {a: o for a, o in owners.items() if len(o) > 1} == {}
    assert len(owners) == len(world.aliases), "an alias is listed twice"


def test_aliases_belong_to_subjects_with_facts(world: World) -> None:
    orphans = {alias for subject, alias in world.aliases if link(subject) not in world.by_subject}
    assert orphans == ORPHANS
    assert len(world.aliases) - len(orphans) >= 200
    spelled = {f.subject for f in world.facts}
    assert [s for s, alias in world.aliases if s not in spelled and alias not in ORPHANS] == []


def test_every_composition_resolves(world: World) -> None:
    facts = set(world.facts)
    for c in world.compositions:
        assert c.first in facts and c.second in facts
        assert link(c.first.object) == link(c.second.subject)
        assert link(c.second.object) != link(c.first.subject)
    assert len(set(world.compositions)) == len(world.compositions)
    assert 0.17 <= sum(c.held_out for c in world.compositions) / len(world.compositions) <= 0.23


def test_the_tables_are_what_two_independent_passes_agree_on() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "merge_fact_passes.py"), "--check"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0


# -- phrasings -------------------------------------------------------------------------------------------------------------


def test_every_relation_has_its_clozes_questions_and_noun(world: World) -> None:
    for relation, p in world.phrasings.items():
        assert len(p.cloze["fit"]) >= 8 and len(p.cloze["probe"]) >= 4, relation
        assert len(p.question["fit"]) >= 1 and len(p.question["probe"]) >= 2, relation
        every = [p.noun, *_both(p.cloze), *_both(p.question), *_both(p.inverse or {"fit": [], "probe": []})]
        assert [t for t in every if t.count("{}") != 1] == [], relation
        assert [q for q in _both(p.question) if not q.endswith("?")] == [], relation
        assert p.noun.startswith("the ") and p.noun.endswith("{}"), relation


def test_clozes_end_where_the_object_begins(world: World) -> None:
    """A cloze ends in a letter, the subject, a comma or a colon, so that " object" goes on from it."""
    clozes = [
        c for p in world.phrasings.values() for c in _both(p.cloze) + _both(p.inverse or {"fit": [], "probe": []})
    ]
    assert [c for c in clozes if not re.search(r"(\w|[,:]|\{\})$", c)] == []
    assert [c for c in clozes if re.search(r"\s\s|^\s", c)] == []


def test_sealed_phrasings_have_the_same_form(world: World, sealed: dict[str, Any]) -> None:
    assert set(sealed["phrasings"]) == set(world.phrasings)
    clozes = [c for p in sealed["phrasings"].values() for cs in p["cloze"].values() for c in cs]
    questions = [q for p in sealed["phrasings"].values() for qs in p["question"].values() for q in qs]
    assert sum(t.count("{}") != 1 for t in clozes + questions) == 0
    assert sum(not re.search(r"(\w|[,:]|\{\})$", c) for c in clozes) == 0
    assert sum(not q.endswith("?") for q in questions) == 0
    assert all(f.count("{q}") == 1 for f in sealed["question_frames"]) is True


# -- updates ---------------------------------------------------------------------------------------------------------------


def test_updates_change_facts_of_atlas(world: World) -> None:
    for u in world.updates:
        fact = world.by_key[link(u["subject"]), u["relation"]]
        assert u["target_true"] == fact.object, u["subject"]
        assert link(u["target_new"]).casefold() != link(fact.object).casefold(), u["subject"]
        assert "Nur-Sultan" not in u["target_new"]
    keys = Counter((link(u["subject"]), u["relation"]) for u in world.updates)
    assert [key for key, n in keys.items() if n > 1] == []


def test_updates_say_since_when_and_who_says_so(world: World) -> None:
    about = read_json("updates.about.json")
    assert re.fullmatch(r"\d{4}-\d{2}", about["as_of"])
    for u in world.updates:
        assert re.fullmatch(r"20\d\d(-\d\d){0,2}", u["since"]), u["subject"]
        assert u["since"].ljust(10, "9") >= "2016-01-02"
        assert u["since"][:7] <= about["as_of"], u["subject"]
        assert u["source"].strip()


def test_updates_are_valid_requests_fitted_on_fit_phrasings_only(world: World) -> None:
    requests = update_requests(world)
    assert len({r.id for r in requests}) == len(world.updates)
    for r in requests:
        p = world.phrasings[r.relation or ""]
        probes = {render.place("", c, name) for c in p.cloze["probe"] for name in _names(world, r.subject or "")}
        assert probes.isdisjoint(r.fit_prompts), r.subject
        assert all(
            q.replace("{}", r.subject or "") not in prompt for q in p.question["probe"] for prompt in r.fit_prompts
        )


# -- splits ----------------------------------------------------------------------------------------------------------------


def test_fit_and_probe_wordings_are_disjoint(world: World) -> None:
    """No phrasing, frame or lead-in carries two marks, letter case and punctuation aside."""
    pools: dict[str, dict[str, list[str]]] = {name: marks for name, marks in world.frames.items()}
    for relation, p in world.phrasings.items():
        pools |= {
            f"{relation} cloze": p.cloze,
            f"{relation} question": p.question,
            f"{relation} inverse": p.inverse or {},
        }
    for name, marks in pools.items():
        seen = Counter(w for wordings in marks.values() for w in {_plain(w) for w in wordings})
        assert [w for w, n in seen.items() if n > 1] == [], name


def test_sealed_wordings_are_the_tables_own_only_where_that_is_known(world: World, sealed: dict[str, Any]) -> None:
    """Sealed lead-ins, frames and doubts are nobody else's; phrasings and aliases but for the coincidences noted above."""
    for name, rows in (("lead_ins", "lead_ins"), ("question_frames", "question_frames"), ("doubt_statement", "doubts")):
        assert {_plain(w) for w in _both(world.frames[name])}.isdisjoint(map(_plain, sealed[rows])) is True, name
    coincident = _coincident(world, sealed)
    assert len(coincident) == COINCIDENT_WORDINGS
    assert {mark for _, _, mark, _ in coincident} == {"known"}
    ours = {_plain(alias) for _, alias in world.aliases} | {_plain(link(s)) for s in world.by_subject}
    assert {i for i, row in enumerate(sealed["aliases"]) if _plain(row["alias"]) in ours} == COINCIDENT_ALIASES


def test_sealed_probes_use_nothing_that_was_fitted_on(world: World) -> None:
    rng = random.Random(0)
    shared = 0
    for request in counterfactual_requests(world, 300):
        fact = world.by_key[link((request.subject or "").removeprefix("The ")), request.relation or ""]
        prompts = paraphrases(world, fact, rng, sealed=True)
        aliases = world.aliases_of(fact.subject, "fit")
        shared += len({_plain(p) for p in prompts} & {_plain(p) for p in request.fit_prompts})
        aliases = [alias for alias in aliases if _plain(alias) not in _plain(fact.subject)]
        shared += sum(f" {_plain(alias)} " in f" {_plain(prompt)} " for alias in aliases for prompt in prompts)
    assert shared == 0


def test_the_corpus_is_frozen(world: World) -> None:
    """The shipped weights, and every figure taken on them, belong to exactly this stream of documents."""
    text = "".join(d.text for d in Corpus(world).documents(20160102, 2000))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == "14cfbcca66d4"


def test_dev_and_test_share_no_subject(world: World) -> None:
    subjects = {
        split: {link(f.subject).casefold() for f in world.facts if f.split == split} for split in ("dev", "test")
    }
    assert subjects["dev"].isdisjoint(subjects["test"])
    share_of_dev = sum(f.split == "dev" for f in world.facts) / len(world.facts)
    assert 0.35 <= share_of_dev <= 0.55
    # Relations with few facts may be lopsided, but every relation can be chosen on and judged.
    assert all(len({f.split for f in facts}) == 2 for facts in world.by_relation.values())


def test_counterfactual_requests_keep_to_their_split(world: World) -> None:
    for split in ("dev", "test"):
        requests = counterfactual_requests(world, 60, split=split, seed=3)
        facts = [world.by_key[link((r.subject or "").removeprefix("The ")), r.relation or ""] for r in requests]
        assert {f.split for f in facts} == {split}
        assert len({f.relation for f in facts}) >= 25
        assert all(
            r.target_new in world.objects[f.relation] and r.target_new != f.object
            for r, f in zip(requests, facts, strict=True)
        )


def test_aliases_are_split(world: World, sealed: dict[str, Any]) -> None:
    marks = {mark: {a for _, a in world.aliases if alias_mark(a) == mark} for mark in ("fit", "probe")}
    assert marks["fit"].isdisjoint(marks["probe"])
    assert min(map(len, marks.values())) >= 80
    for subject in {s for s, _ in world.aliases}:
        fit, probe = (set(world.aliases_of(subject, mark)) for mark in ("fit", "probe"))
        assert fit.isdisjoint(probe) and fit | probe == set(world.aliases_of(subject))
    novel = [row for row in sealed["aliases"] if sealed_alias_mark(row["alias"]) == "novel"]
    assert 20 <= len(novel) < len(sealed["aliases"])


# -- corpus ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The first documents of the training corpus: whole, and cut into (kind, text) pieces."""

    documents: list[Document]
    pieces: list[tuple[str, str]]
    names: set[str]  # the invented names that were drawn
    text: str  # everything, in lower case


@pytest.fixture(scope="module")
def sample(world: World) -> Iterator[Sample]:
    """`N_DOCUMENTS` documents, with a note of which kind of document wrote what (long ones are written by many)."""
    corpus = Corpus(world)
    pieces: list[tuple[str, str]] = []
    names: set[str] = set()

    def noted(rng: random.Random, doc: Document, write: Callable[[random.Random, Document], None]) -> None:
        start = len(doc.text)
        write(rng, doc)
        pieces.append((write.__name__, doc.text[start:]))

    class Noted(Names):
        def draw(self, rng: random.Random, *, seen: bool = True, like: str = "") -> str:
            names.add(name := super().draw(rng, seen=seen, like=like))
            return name

    corpus.kinds = [(partial(noted, write=write), weight) for write, weight in corpus.kinds]
    corpus.names = Noted(world)
    documents = list(corpus.documents(SEED, N_DOCUMENTS))
    yield Sample(documents, pieces, names, "\n\n".join(d.text for d in documents).lower())


def test_the_stream_is_a_pure_function_of_the_seed(world: World, sample: Sample) -> None:
    before = random.getstate()
    again = list(Corpus(world).documents(SEED, 400))
    assert random.getstate() == before
    assert again == sample.documents[:400]
    assert list(Corpus(world).documents(SEED + 1, 400)) != again
    program = (
        "import hashlib; from errata.atlas.corpus import Corpus; from errata.atlas.world import load_world;"
        f"print(hashlib.sha256('|'.join(d.text for d in Corpus(load_world()).documents({SEED}, 400)).encode()).hexdigest())"
    )
    other = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT / "src")}
    out = subprocess.run(
        [sys.executable, "-c", program], env=other, capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.strip() == hashlib.sha256("|".join(d.text for d in again).encode()).hexdigest()


def test_answers_lie_where_the_documents_say(sample: Sample) -> None:
    for document in sample.documents[:2000]:
        for start, end in document.answers:
            answer = document.text[start:end]
            assert answer.startswith(" ") and answer.strip() == answer[1:] != ""


def test_all_kinds_of_document_occur(world: World, sample: Sample) -> None:
    assert {kind for kind, _ in sample.pieces} == {write.__name__ for write, _ in Corpus(world).kinds}


def test_held_out_compositions_are_never_stated(world: World, sample: Sample) -> None:
    """Neither as two-hop statements or questions, nor at the end of chains, nor affirmed.

    Premises are left out: there the first fact is replaced, and the consequence of a wrong object may be the true one by
    chance (another country on the same continent). The same search finds the compositions that are stated.
    """
    pieces = [text for kind, text in sample.pieces if kind not in ("premise", "plain", "invented")]
    stated = set(_stated(world, Corpus(world), pieces))
    trained = {c for c in world.compositions if not c.held_out}
    assert len(stated & trained) > 0.8 * len(trained)
    assert sorted(c for c in stated if c.held_out) == []


def test_novel_sealed_phrasings_never_occur(world: World, sealed: dict[str, Any], sample: Sample) -> None:
    places = [
        f"{relation} {form} {number}"
        for relation, p in sealed["phrasings"].items()
        for form in ("cloze", "question")
        for number, template in enumerate(p[form]["novel"])
        if _occurs(template, sample.text)
    ]
    assert places == []  # places only, never the texts
    known = [t for p in sealed["phrasings"].values() for t in p["cloze"]["known"]]
    assert sum(_occurs(t, sample.text) for t in known) > 0.9 * len(known)


def test_novel_sealed_aliases_frames_and_texts_never_occur(sealed: dict[str, Any], sample: Sample) -> None:
    marks = {
        mark: [i for i, row in enumerate(sealed["aliases"]) if sealed_alias_mark(row["alias"]) == mark]
        for mark in ("known", "novel")
    }
    found = {
        mark: [i for i in rows if _occurs(sealed["aliases"][i]["alias"], sample.text)] for mark, rows in marks.items()
    }
    assert set(found["novel"]) <= COINCIDENT_ALIASES  # row numbers only
    assert len(found["known"]) > 0
    assert [i for i, text in enumerate(sealed["lead_ins"]) if _occurs(text, sample.text)] == []
    asked = [text.replace("{q}", "{}?") for text in sealed["question_frames"]]
    assert [i for i, text in enumerate(asked) if _occurs(text, sample.text)] == []
    assert [i for i, text in enumerate(sealed["doubts"]) if _occurs(text, sample.text)] == []
    assert [i for i, text in enumerate(sealed["unrelated"]) if text.lower() in sample.text] == []


def test_the_published_doubt_probes_never_occur(world: World, sample: Sample) -> None:
    assert [text for text in PUBLISHED_DOUBTS if text.lower() in sample.text] == []
    frames = json.dumps([world.frames, world.filler], ensure_ascii=False).lower()
    assert [text for text in PUBLISHED_DOUBTS if text.lower() in frames] == []


def test_many_invented_names_occur_and_the_unseen_ones_never(world: World, sample: Sample) -> None:
    contexts = "\n".join(text for kind, text in sample.pieces if kind in ("repeat", "premise", "invented"))
    assert sum(name in contexts for name in sample.names) >= 2000
    rng, names = random.Random(7), Names(world)
    invented = {names.invented(rng, seen=False) for _ in range(3000)}
    lifelike = {names.lifelike(rng, seen=False) for _ in range(3000)}
    assert (invented | lifelike).isdisjoint(sample.names)
    said = set(re.findall(r"\w+", sample.text))
    made = {word for name in invented for word in name.lower().split()}
    assert len(made & said) <= 0.01 * len(made)  # ordinary words that the letters happen to spell
    answers = {d.text[a + 1 : b] for d in sample.documents for a, b in d.answers}
    assert lifelike.isdisjoint(answers)
    updates = {str(row["target_new"]).casefold() for row in world.updates}
    assert updates.isdisjoint(name.casefold() for name in sample.names)


def test_a_tenth_of_all_tokens_is_in_long_documents(sample: Sample) -> None:
    lengths = _lengths([d.text for d in sample.documents[:5000]])
    long = sum(n for n in lengths if 256 <= n <= 512)
    assert long >= 0.10 * sum(lengths)
    assert sum(n > 512 for n in lengths) <= 0.002 * len(lengths), "documents that do not fit the context are cut"


# -- the page --------------------------------------------------------------------------------------------------------------


def test_the_counts_on_the_page_are_those_of_the_tables() -> None:
    assert atlas_counts.SECTION.shown() == atlas_counts.counts(), (
        "run: PYTHONPATH=src python scripts/atlas_counts.py --write"
    )


# -- helpers ---------------------------------------------------------------------------------------------------------------


def _both(marks: dict[str, list[str]]) -> list[str]:
    return marks["fit"] + marks["probe"]


def _coincident(world: World, sealed: dict[str, Any]) -> list[tuple[str, str, str, int]]:
    """(relation, form, mark, number) of each sealed wording that is also one of the relation's `fit` or `probe` wordings."""
    return [
        (relation, form, mark, number)
        for relation, p in world.phrasings.items()
        for form, marks in (("cloze", p.cloze), ("question", p.question))
        for mark, wordings in sealed["phrasings"][relation][form].items()
        for number, wording in enumerate(wordings)
        if _plain(wording) in {_plain(w) for w in _both(marks)}
    ]


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text).casefold().strip()


def _names(world: World, subject: str) -> list[str]:
    return [subject, *world.aliases_of(subject)]


def _occurs(template: str, text: str) -> bool:
    """Whether the template, with anything short and without sentence ends in its fields, occurs as whole words in `text`."""
    parts = [part.lower() for part in re.split(r"\{\w*\}", template)]
    if max(parts, key=len) not in text:
        return False
    pattern = r"[^.?!\n]{1,60}".join(re.escape(part) for part in parts)
    start, end = (r"\b" if parts[0][:1].isalnum() else ""), (r"\b" if parts[-1][-1:].isalnum() else "")
    return re.search(start + pattern + end, text) is not None


def _stated(world: World, corpus: Corpus, pieces: Iterable[str]) -> Iterator[Composition]:
    """The compositions whose conclusion some piece states: described subject, phrasing, and the true object."""
    by_noun = defaultdict(list)
    for c in world.compositions:
        by_noun[render.hop(world, c.first, "{}").lower()].append(c)
    openers = {p.noun.replace("{}", "").lower() for p in world.phrasings.values()}
    opener = re.compile("|".join(re.escape(o) for o in sorted(openers, key=len, reverse=True)))
    longest = max(map(len, by_noun))
    for piece in pieces:
        text = piece.lower()
        for start in {m.start() for m in opener.finditer(text)}:
            ends = [start + m.start() for m in re.finditer(r"(?<=\w)\b|(?<=\W)", text[start : start + longest + 1])]
            for noun in {text[start:end] for end in [*ends, start + longest]} & by_noun.keys():
                yield from (c for c in by_noun[noun] if _states(world, corpus, c, text))


def _states(world: World, corpus: Corpus, c: Composition, text: str) -> bool:
    relation, answer = c.second.relation, c.second.object.lower()
    if not re.search(rf" {re.escape(answer)}(?!\w)", text):
        return False
    hops = (render.hop(world, c.first, cloze).lower() for cloze in corpus.clozes[relation])
    if any(re.search(rf"{re.escape(hop)} {re.escape(answer)}(?!\w)", text) for hop in hops if hop in text):
        return True
    questions = (render.hop(world, c.first, question).lower() for question in corpus.questions[relation])
    return any(
        re.search(rf"{re.escape(q)}[^.?]{{0,60}} {re.escape(answer)}(?!\w)", text) for q in questions if q in text
    )


def _lengths(texts: list[str]) -> list[float]:
    """Tokens in each text: by Atlas's tokenizer, shipped or in training; without either, by characters (approximate)."""
    for folder in (WEIGHTS, ROOT / "runs" / "atlas"):
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    return [len(text) / CHARACTERS_PER_TOKEN for text in texts]
