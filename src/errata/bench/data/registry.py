"""Data sets by name: what they are, where their files come from, and their cases.

A published set is read from a path, from the data folder (`data_folder`), or from the hub where its repository and files could be
verified; for the others the error says where the authors keep the file. Atlas's sets are made on the spot, by seed.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from errata.bench.cases import Case
from errata.bench.data import faults
from errata.bench.data.counterfact import CounterFactRecord, counterfact_case, read_counterfact, read_multi_counterfact
from errata.bench.data.kilt import FEVER_LABELS, claim_case, read_kilt
from errata.bench.data.knowedit import knowedit_case, read_knowedit
from errata.bench.data.known import known_facts
from errata.bench.data.records import Numbered, Problem, Record, made, read_records, read_rows, settle
from errata.bench.data.ripple import RippleRecord, ripple_case
from errata.bench.data.scotus import read_scotus, scotus_case
from errata.bench.data.snippets import SNIPPETS, consistency_texts, snippet_groups
from errata.bench.data.zsre import read_zsre, zsre_case
from errata.edit import conflicts
from errata.errors import ConfigError, RecordError
from errata.files import write_atomically
from errata.locate.facts import KnownFact
from errata.model.statistics_files import cache_directory

_T = TypeVar("_T")
Flagged = Literal["keep", "drop"]
Bad = Literal["refuse", "skip"]
CHOICES: Mapping[str, tuple[str, ...]] = {"flagged": ("keep", "drop"), "bad": ("refuse", "skip")}  # for any data set
Layout = Literal[
    "counterfact",
    "multi-counterfact",
    "ripple",
    "zsre",
    "fever",
    "scotus",
    "knowedit",
    "known",
    "texts",
    "weights",
    "atlas",
]

_READERS: dict[Layout, Callable[[Path, list[Problem]], Numbered[Any]]] = {
    "counterfact": read_counterfact,
    "multi-counterfact": read_multi_counterfact,
    "ripple": lambda path, problems: read_records(path, RippleRecord, problems),
    "zsre": read_zsre,
    "fever": read_kilt,
    "scotus": read_scotus,
    "knowedit": read_knowedit,
}
_ROME = "the data page of the ROME project (rome.baulab.info/data/dsets)"
_KE = "the data page of the KnowledgeEditor project (nicola-decao/KnowledgeEditor)"
_RIPPLE = "data/benchmark of the authors' repository edenbiran/RippleEdits (Git LFS)"


@dataclass(frozen=True)
class Hub:
    """A data set's repository on the hub at one commit. files: {split: file}; none for one stored as Parquet in `data/`."""

    repository: str
    revision: str
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """A data set. file: the published name of its file, by split where there are several; size: records, as published.

    options: what `load_cases` takes besides, with the values there are, the default first; none: a path.
    """

    name: str
    about: str
    source: str
    layout: Layout
    file: str | Mapping[str, str] = ""
    where: str = ""
    size: int | None = None
    hub: Hub | None = None
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def file_of(self, split: str) -> str:
        """The file's published name. Raises ConfigError for a split that there is not."""
        if isinstance(self.file, str):
            _check_only_split(self.name, split)
            return self.file
        if split not in self.file:
            raise ConfigError(f"expected a split of {self.name} ({', '.join(self.file)}), found {split!r}.")
        return self.file[split]


_COUNTERFACT_HUB = Hub("azhx/counterfact", "c01c413f856ee38f5c080c9fc5e87aff478e2ff9")


def _knowedit(name: str, about: str, size: int, files: dict[str, str], verified: bool = True) -> Dataset:
    hub = Hub("zjunlp/KnowEdit", "6d218881e60c7c8be836bd2befd598eb3b318be4", files) if verified else None
    bare = {split: file.rsplit("/", 1)[1] for split, file in files.items()}
    where = "benchmark/ of the data set zjunlp/KnowEdit on the hub"
    return Dataset(f"knowedit-{name}", about, "Zhang et al. 2024", "knowedit", bare, where, size, hub)


_ALL = (
    Dataset(
        "counterfact",
        "counterfactual rewrites with paraphrases and neighbours",
        "Meng et al. 2022",
        "counterfact",
        "counterfact.json",
        _ROME,
        21_919,
        _COUNTERFACT_HUB,
        {"snippets": ()},
    ),
    Dataset(
        "multi-counterfact",
        "CounterFact with each (subject, relation) once: many edits at once",
        "Meng et al. 2023",
        "multi-counterfact",
        "multi_counterfact.json",
        _ROME,
        20_877,
        None,
        {"snippets": ()},
    ),
    *(
        Dataset(f"ripple-{part}", about, "Cohen et al. 2024", "ripple", f"{part}.json", _RIPPLE, size)
        for part, about, size in (
            ("popular", "what edits of much-read entities entail, six axes", 885),
            ("random", "what edits of random entities entail, six axes", 1922),
            ("recent", "what facts new since 2022 entail, six axes", 1948),
        )
    ),
    Dataset(
        "zsre",
        "questions with rephrasings, KILT's layout or the evaluation array",
        "Levy et al. 2017; De Cao et al. 2021; Mitchell et al. 2022",
        "zsre",
        "zsre_mend_eval.json",
        _ROME,
        19_086,
        None,
        {"target": ("counterfactual", "correction")},
    ),
    Dataset(
        "fever",
        "claims to turn round, KILT's layout with rephrases",
        "Thorne et al. 2018; De Cao et al. 2021",
        "fever",
        {"test": "fever-dev-kilt.jsonl", "train": "fever-train-kilt.jsonl"},
        _KE,
        10_444,
    ),
    Dataset(
        "scotus",
        "opinions by area, whose definitions shift: a stream of edits",
        "Chalkidis et al. 2022; Hartvigsen et al. 2023",
        "scotus",
        {"test": "scotus_test.jsonl", "train": "scotus_train.jsonl"},
        "the splits of GRACE's SCOTUS data (Thartvigsen/GRACE), each written as JSONL with text and label",
        931,
    ),
    Dataset(
        "attribute-snippets",
        "texts about what has an object: the references of consistency, for `snippets`",
        "Meng et al. 2022",
        "texts",
        "attribute_snippets.json",
        _ROME,
    ),
    Dataset(
        "tf-idf",
        "the published weights of words for consistency (ours are fitted on the texts)",
        "Meng et al. 2022",
        "weights",
        {"idf": "idf.npy", "vocabulary": "tfidf_vocab.json"},
        _ROME,
    ),
    Dataset("known-1000", "facts to trace, no edits", "Meng et al. 2022", "known", "known_1000.json", _ROME, 1209),
    _knowedit(
        "recent",
        "facts new since 2022 with portability and locality",
        1266,
        {f"{part}": f"benchmark/wiki_recent/recent_{part}.json" for part in ("test", "train")},
    ),
    _knowedit(
        "counterfact",
        "counterfactual facts with portability and locality",
        885,
        {part: f"benchmark/wiki_counterfact/{part}_cf.json" for part in ("test", "train")},
    ),
    _knowedit("zsre", "questions with portability and locality", 1301, {"test": "benchmark/ZsRE/ZsRE-test-all.json"}),
    _knowedit(
        "wikibio",
        "sentences of biographies to rewrite",
        306,
        {part: f"benchmark/WikiBio/wikibio-{part}-all.json" for part in ("test", "train")},
    ),
    _knowedit(
        "sanitation",
        "answers to take out",
        80,
        {part: f"benchmark/trivia/trivia_qa_{part}.json" for part in ("test", "train")},
        verified=False,
    ),
    Dataset(
        "atlas-counterfact",
        "counterfactual edits of Atlas in CounterFact's schema, with portability",
        "made from Atlas",
        "atlas",
        options={"implications": ("all", "half", "none"), "portable": ("no", "yes")},
    ),
    Dataset(
        "atlas-ripple",
        "what edits of Atlas entail, in RippleEdits' schema",
        "made from Atlas",
        "atlas",
        options={"implications": ("all", "half", "none")},
    ),
    Dataset("atlas-fever", "claims about Atlas to turn round, in FEVER's schema", "made from Atlas", "atlas"),
    Dataset("atlas-zsre", "questions about Atlas with rephrases, in zsRE's schema", "made from Atlas", "atlas"),
    Dataset(
        "atlas-docket", "invented cases by area, whose definitions shift: a stream of edits", "made from Atlas", "atlas"
    ),
    Dataset("atlas-updates", "what has changed since 2016, judged both ways", "made from Atlas", "atlas"),
    Dataset("atlas-known", "facts of Atlas to trace, no edits", "made from Atlas", "atlas"),
)
DATASETS: Mapping[str, Dataset] = {dataset.name: dataset for dataset in _ALL}
CASELESS: Mapping[Layout, str] = {
    "known": "facts to trace and no edits; load_facts reads it, and `errata trace --facts`",
    "texts": "reference texts and no edits; give its file as the option `snippets` of counterfact",
    "weights": "weights of words and no edits; `errata.bench.data.snippets.published_tfidf` reads them",
}
TRACED = frozenset({"known-1000", "atlas-known"})


def load_cases(
    name: str,
    *,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    path: str | Path | None = None,
    flagged: Flagged = "keep",
    bad: Bad = "refuse",
    together: bool = False,
    model_data: tuple[Any, Any] | None = None,
    left_out: list[Problem] | None = None,
    references: bool = True,
    **options: str,
) -> list[Case]:
    """The cases of a data set, or of a file in one of its layouts (name: its path).

    n: the first `n` of a published file, as the papers take them; as many as are drawn of Atlas (None: all there are). seed: what is
    drawn. split: Atlas's facts, or a file of KnowEdit, FEVER or SCOTUS; the other sets, and files, have one, test. path: the file, or
    a folder that holds it under its published name.
    flagged: with "drop", tests that `check` finds fault with are left out, and cases whose edit it does;
    `model_data` (model, tokenizer, unedited) adds those whose conditions fail on it. bad: with "skip", rows that do not
    fit are left out. Rows that fit and have nothing to write (zsRE's without `alt`) always are; rows behind those that `n` takes
    are nobody's concern. What is left out is counted in a warning, or added to `left_out`. together: the edits will be in the
    model at once, so none may be about the fact of another. references: whether cases of CounterFact get the texts that
    consistency is measured against, where there are any; the published file is large. options: as `DATASETS[name].options` says.

    Raises RecordError for bad rows, and for edits that conflict if they are to be together; ConfigError for names, options
    and files that there are not.
    """
    _check_options("any data set", CHOICES, {"flagged": flagged, "bad": bad})
    problems: list[Problem] = []
    dataset, file, cases, rows = _cases(name, n, seed, split, path, options, problems, references)
    _pass_over(problems, bad, dataset.name, left_out)
    if together:
        one_edit_per_fact(cases)
    if flagged == "drop":
        found = faults.check_cases(cases, str(file or dataset.name), model_data, rows)
        cases = faults.without(cases, found)
        if left_out is not None:
            left_out += [problem for problem in found if problem.unit]
    return cases


def load_facts(
    name: str,
    *,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    path: str | Path | None = None,
    bad: Bad = "refuse",
    left_out: list[Problem] | None = None,
) -> list[KnownFact]:
    """The facts of a set for tracing (or of a file in known_1000's layout). Arguments and errors as in `load_cases`."""
    _check_options("any data set", CHOICES, {"bad": bad})
    problems: list[Problem] = []
    found = _facts(name, n, seed, split, path, problems)
    _pass_over(problems, bad, name, left_out)
    return [fact for _, fact in found]


def first_records(
    path: str | Path,
    kind: type[Record],
    n: int | None,
    *,
    split: str = "test",
    bad: Bad = "refuse",
    left_out: list[Problem] | None = None,
) -> list[Record]:
    """The first n records of a file, which has one split, for what is no case yet. Arguments and errors as in `load_cases`."""
    _check_only_split(str(path), split)
    _check_options("any data set", CHOICES, {"bad": bad})
    problems: list[Problem] = []
    found = _first(n, read_records(path, kind, problems), problems)
    _pass_over(problems, bad, str(path), left_out)
    return [record for _, record in found]


def check(
    name: str,
    *,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    path: str | Path | None = None,
    model_data: tuple[Any, Any] | None = None,
    **options: str,
) -> list[Problem]:
    """Everything wrong with a data set: rows that do not fit, edits of one fact, contradictory answers, answers in their own prompts,
    queries without answers; with (model, tokenizer), conditions that fail. Arguments as in `load_cases`.
    """
    problems: list[Problem] = []
    if name in TRACED or (name not in DATASETS and layout_of(Path(name)) == "known"):
        facts = _facts(name, n, seed, split, path, problems)
        return problems + faults.check_facts(facts, str(path or name))
    if name in DATASETS and DATASETS[name].layout == "texts":
        for _ in snippet_groups(fetch(DATASETS[name], split, path), problems):
            pass
        return problems
    dataset, file, cases, rows = _cases(name, n, seed, split, path, options, problems, "snippets" in options)
    return problems + faults.check_cases(cases, str(file or dataset.name), model_data, rows)


def one_edit_per_fact(cases: Sequence[Case]) -> None:
    """Raises RecordError, naming the cases, if two edits are about one (subject, relation): together they contradict each other."""
    names = {id(case.request): case.id for case in cases}
    pairs = conflicts([case.request for case in cases])
    if pairs:
        shown = "; ".join(
            f"{names[id(a)]} and {names[id(b)]}, ({a.subject!r}, {a.relation or a.prompt!r})" for a, b in pairs[:5]
        )
        more = f"; {len(pairs) - 5} more" if len(pairs) > 5 else ""
        raise RecordError(
            f"expected at most one edit of a fact among edits that are active together, found cases {shown}{more}; "
            "take multi-counterfact for CounterFact, or leave the later ones out."
        )


def first_of_each_fact(cases: Sequence[Case]) -> tuple[list[Case], dict[str, str]]:
    """The cases without those that write another object over the fact of an earlier one, and {"case ID": why it is left out}.

    In one model at once the two contradict each other. A second case of the same edit stays.
    """
    first: dict[str, Case] = {}
    kept: list[Case] = []
    left_out = {}
    for case in cases:
        request, before = case.request, first.setdefault(case.request.key, case)
        if before.request.target_new.casefold() == request.target_new.casefold():
            kept.append(case)
        else:
            about = f"({request.subject!r}, {request.relation or request.prompt!r})"
            left_out[f"case {case.id}"] = f"it edits {about}, as case {before.id} does, to another object"
    return kept, left_out


# -- files ---------------------------------------------------------------------------------------------------------------


def data_folder() -> Path:
    """Where data sets are looked for without a path: `data` under ERRATA_CACHE, else under errata in the user's cache."""
    return cache_directory().parent / "data"


def find(dataset: Dataset, split: str = "test", path: str | Path | None = None) -> Path | None:
    """The file on this machine: at the path, in the data folder, in the hub's cache; None if it is in none of them."""
    name = dataset.file_of(split)
    places = [Path(path), Path(path) / name] if path else [data_folder() / name]
    found = next((place for place in places if place.is_file()), None)
    if found or path or not dataset.hub or split not in dataset.hub.files:
        return found
    from huggingface_hub import try_to_load_from_cache

    hub = dataset.hub
    cached = try_to_load_from_cache(hub.repository, hub.files[split], revision=hub.revision, repo_type="dataset")
    return Path(cached) if isinstance(cached, str) else None


def fetch(dataset: Dataset, split: str = "test", path: str | Path | None = None) -> Path:
    """The file, from the hub if it is not here. Raises ConfigError that says where to get it."""
    if found := find(dataset, split, path):
        return found
    name, hub = dataset.file_of(split), dataset.hub
    advice = f"take {name} from {dataset.where} and give its path, or put it in {data_folder()}"
    if path:
        raise ConfigError(f"expected {name} of {dataset.name} at {path}, found no such file; {advice}.")
    if hub is None:
        raise ConfigError(f"expected the file of {dataset.name}, found none, and no hub repository is known; {advice}.")
    try:
        return _download(hub, data_folder() / name, split)
    except (OSError, ValueError) as error:  # what huggingface_hub raises for names and networks
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigError(
            f"cannot fetch {dataset.name} from the hub ({hub.repository}): {reason}; {advice}."
        ) from error


def _download(hub: Hub, target: Path, split: str) -> Path:
    """A file of the hub's cache; a set stored as Parquet becomes `target`, in the order of its case ids."""
    from huggingface_hub import hf_hub_download, snapshot_download

    common: dict[str, Any] = {"repo_type": "dataset", "revision": hub.revision}
    if hub.files:
        if split not in hub.files:
            raise ValueError(f"it has no split {split!r}")
        return Path(hf_hub_download(hub.repository, hub.files[split], **common))
    from pyarrow.parquet import read_table

    folder = Path(snapshot_download(hub.repository, allow_patterns=["data/*.parquet"], **common))
    rows = [row for file in sorted(folder.glob("data/*.parquet")) for row in read_table(file).to_pylist()]
    if not rows:
        raise ValueError("it holds no Parquet files under data/")
    rows.sort(key=lambda row: row["case_id"])
    write_atomically(target, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    return target


def layout_of(path: Path) -> Layout:
    """The layout of a file, by the fields of its first row. Raises RecordError for one that is none of ours."""
    if not path.exists():
        near = get_close_matches(str(path), DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; the data sets are {', '.join(DATASETS)}."
        raise ConfigError(f"expected a data set's name or a file, found {str(path)!r}{hint}")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text.lstrip().startswith("{") and '"success"' in text[:200]:
        return "knowedit"
    rows = read_rows(path, [])
    first = rows[0][1] if rows and isinstance(rows[0][1], dict) else {}
    marks: tuple[tuple[Layout, set[str]], ...] = (
        ("counterfact", {"requested_rewrite"}),
        ("ripple", {"edit"}),
        ("zsre", {"src", "answers"}),
        ("zsre", {"input", "output"}),
        ("scotus", {"text", "label"}),
        ("knowedit", {"concept", "labels"}),
        ("knowedit", {"prompt", "target_new"}),
        ("known", {"prompt", "attribute"}),
    )
    for layout, fields in marks:
        if fields <= set(first):
            answered = isinstance(first.get("output"), list) and any(
                isinstance(one, dict) and one.get("answer") in FEVER_LABELS for one in first["output"]
            )
            return "fever" if answered else layout
    found = ", ".join(first) or "no fields"
    raise RecordError(
        f"expected rows of CounterFact, RippleEdits, zsRE, FEVER, SCOTUS, KnowEdit or known_1000 in {path}, found {found}."
    )


# -- cases ---------------------------------------------------------------------------------------------------------------


def _cases(
    name: str,
    n: int | None,
    seed: int,
    split: str,
    path: str | Path | None,
    options: Mapping[str, str],
    problems: list[Problem],
    texts: bool,
) -> tuple[Dataset, Path | None, list[Case], dict[str, int]]:
    """The data set, its file if it has one, its cases and their rows in it; what does not fit goes to `problems`."""
    dataset = DATASETS.get(name)
    if dataset is None:
        layout = layout_of(Path(name))
        dataset = next(d for d in _ALL if d.layout == layout)
        dataset, path = Dataset(Path(name).name, "", "a file", layout, options=dataset.options), path or name
    if dataset.name in TRACED or dataset.layout in CASELESS:
        raise ConfigError(f"{name} holds {CASELESS.get(dataset.layout, CASELESS['known'])}.")
    _check_options(dataset.name, dataset.options, options)
    if dataset.layout == "atlas":
        # Atlas's own module: the one place where benchmarks reach it, and only when it is asked for.
        made_here: list[Case] = import_module("errata.atlas.cases").cases(name, n=n, seed=seed, split=split, **options)
        return dataset, None, made_here, {}
    if name not in DATASETS:
        _check_only_split(name, split)
    file = Path(path) if name not in DATASETS and path else fetch(dataset, split, path)
    rows = _READERS[dataset.layout](file, problems)
    found = _first(n, made(file, rows, _maker(dataset, seed, options), problems), problems)
    if texts and dataset.layout in ("counterfact", "multi-counterfact"):
        found = _with_references(found, dict(rows), options.get("snippets"), file.parent, problems)
    return dataset, file, [case for _, case in found], {case.id: row for row, case in found}


def _first(n: int | None, found: list[tuple[int, _T]], problems: list[Problem]) -> list[tuple[int, _T]]:
    """The first n; problems of rows behind them go."""
    if n is not None and 0 < n <= len(found):
        problems[:] = [problem for problem in problems if problem.row <= found[n - 1][0]]
    return found[:n]


def _pass_over(problems: list[Problem], bad: Bad, name: str, left_out: list[Problem] | None) -> None:
    """Tell which rows are left out. Raises RecordError if bad ones may not be."""
    if bad == "refuse":
        settle([problem for problem in problems if problem.kind == "row"], None)
    if left_out is not None:
        left_out += problems
    elif problems:
        warnings.warn(f"{len(problems)} rows of {name} left out; the first: {problems[0]}", stacklevel=3)


def _maker(dataset: Dataset, seed: int, options: Mapping[str, Any]) -> Callable[[Any], Case]:
    if dataset.layout == "zsre":
        return partial(zsre_case, seed=seed, **options)
    plain: dict[Layout, Callable[[Any], Case]] = {
        "knowedit": knowedit_case,
        "fever": claim_case,
        "scotus": scotus_case,
        "ripple": ripple_case,
    }
    return plain.get(dataset.layout, counterfact_case)


def _with_references(
    found: list[tuple[int, Case]],
    records: Mapping[int, CounterFactRecord],
    snippets: str | None,
    folder: Path,
    problems: list[Problem],
) -> list[tuple[int, Case]]:
    """The numbered cases with their texts for consistency: of the option's file, or of the one in the folder or the data folder."""
    beside = (place / SNIPPETS for place in (folder, data_folder()) if (place / SNIPPETS).is_file())
    path = snippets or next(beside, None)
    if path is None or not found:
        return found
    keys = {row: records[row].about for row, _ in found}
    bad: list[Problem] = []
    texts, tfidf = consistency_texts(path, set(keys.values()), bad)
    # Rows of another file than the cases': the unit says so where the file's name does not.
    problems += [replace(problem, unit="attribute snippets") for problem in bad]
    return [(row, replace(case, references=texts.get(keys[row], ()), tfidf=tfidf)) for row, case in found]


def _facts(
    name: str, n: int | None, seed: int, split: str, path: str | Path | None, problems: list[Problem]
) -> list[tuple[int, KnownFact]]:
    """The facts with their rows, 0 where they are made here."""
    if name == "atlas-known":
        return [(0, fact) for fact in import_module("errata.atlas.cases").known_facts(n=n, seed=seed, split=split)]
    if name in DATASETS and name not in TRACED:
        raise ConfigError(f"{name} holds edits; load_cases reads it.")
    if name not in DATASETS:
        _check_only_split(name, split)
    file = fetch(DATASETS[name], split, path) if name in DATASETS else Path(name)
    return _first(n, known_facts(file, problems), problems)


def _check_only_split(name: str, split: str) -> None:
    """Raises ConfigError for a split of what is one file."""
    if split != "test":
        raise ConfigError(f"{name} has one split, test, and none named {split!r}; leave the split out.")


def _check_options(name: str, there: Mapping[str, tuple[str, ...]], options: Mapping[str, str]) -> None:
    for option, value in options.items():
        if option not in there:
            raise ConfigError(f"{name} has no option {option!r}; it has: {', '.join(there) or 'none'}.")
        values = there[option]
        if values and value not in values:
            raise ConfigError(f"expected {option} of {name} to be {' or '.join(values)}, found {value!r}.")
