"""The command line on tiny random models: every command, its JSON, its exit codes, and a fit that is interrupted."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import errata
from conftest import END, steering_part, tiny_model
from errata.cli import app
from errata.edit import EditRequest, write_requests
from errata.editors.grace import GRACE
from errata.editors.sake import SAKE
from errata.errors import RequestError
from errata.model import loading
from errata.model.fingerprint import base_of
from errata.patch import Patch, load_patch
from errata.scope.gate import Gate, load_gate

SMALL = ["--set", "prompts=6", "--set", "context_prompts=3", "--set", "implication_prompts=3"]
REQUESTS = [
    EditRequest(
        subject=subject,
        prompt="{} is in",
        target_true="Seattle",
        target_new=new,
        relation="city",
        fit_prompts=(f"{subject} stands in", f"You find {subject} in", f"Go and see {subject} in"),
        paraphrase_prompts=(f"{subject} is found in",),
        neighborhood_prompts=("The capital of France is",),
    )
    for subject, new in (("The Needle", "Goa"), ("The Tower", "Rome"), ("The Gate", "Oslo"), ("The Dome", "Lima"))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, _bpe: str) -> SimpleNamespace:
    """`model`, `other` (a deeper one), `requests` (a file), `patch` (a file fitted on them): as strings."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe), bos_token=END, eos_token=END, pad_token=END
    )
    for name, layers in (("model", 2), ("other", 3)):
        tiny_model("gpt2", layers, n_positions=1024).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_requests(folder / "requests.jsonl", REQUESTS)
    found = SimpleNamespace(
        folder=folder,
        model=str(folder / "model"),
        other=str(folder / "other"),
        requests=str(folder / "requests.jsonl"),
        patch=str(folder / "patch.safetensors"),
    )
    made = run("fit", found.requests, "--model", found.model, "--out", found.patch, *SMALL)
    assert made.exit_code == 0, made.output
    return found


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def json_of(result: Result) -> dict[str, Any]:
    """The one object on stdout; anything else there fails."""
    assert result.exit_code == 0, result.output
    value = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(value, dict)
    return value


def refused(result: Result) -> str:
    """The one sentence of a refusal."""
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def atlas(monkeypatch: pytest.MonkeyPatch, place: SimpleNamespace) -> Iterator[str]:
    """The tiny model under the name of the bundled one."""
    monkeypatch.setattr(loading, "bundled", lambda: {"atlas": Path(place.model)})
    yield "atlas"


# -- small commands ------------------------------------------------------------------------------------------------------


def test_help_and_version() -> None:
    assert run("--version").stdout == f"errata {errata.__version__}\n"
    text = run("--help").stdout
    for word in ("demo", "ask", "fit", "show", "verify", "methods", "calibrate", "updates", "Exit codes", "130"):
        assert word in text
    assert run("nonsense").exit_code == 2 and run("fit").exit_code == 2


def test_methods() -> None:
    [sake] = [m for m in json_of(run("methods", "--json"))["methods"] if m["method"] == "sake"]
    assert sake["summary"] and "paper-gpt2-xl-counterfact" in sake["presets"] and sake["options"]["prompts"] == 50
    assert "sake" in run("methods").stdout


def test_updates(tmp_path: Path) -> None:
    value = json_of(run("updates", "--json"))
    assert value["n"] >= 40 and value["as_of"]
    assert run("updates").stdout.strip() == value["path"]
    copy = tmp_path / "updates.jsonl"
    assert json_of(run("updates", "--out", copy, "--json"))["path"] == str(copy)
    assert copy.read_bytes() == Path(value["path"]).read_bytes()
    assert len(errata.read_requests(copy)) == value["n"]


def test_show(place: SimpleNamespace) -> None:
    value = json_of(run("show", place.patch, "--json"))
    assert (value["n_edits"], value["format_version"], value["method"]) == (4, 1, "sake")
    assert value["patch"] == load_patch(place.patch).id and value["base"]["family"] == "gpt2"
    first = value["edits"][0]
    assert first["id"] == REQUESTS[0].id and first["prompt"] == "The Needle is in"
    assert first["steps"] == len(first["rank"]) >= 1 and first["bytes"] > 0 and first["radius"] > 0
    table = run("show", place.patch).stdout
    assert "Seattle -> Goa" in table and REQUESTS[3].id in table


def test_ask(place: SimpleNamespace) -> None:
    prompt = REQUESTS[0].text
    plain = json_of(run("ask", prompt, "--model", place.model, "--json"))
    assert plain["decision"] is None and plain["answer"] == plain["unedited_answer"]
    edited = json_of(run("ask", prompt, "--model", place.model, "--patch", place.patch, "--json"))
    assert edited["unedited_answer"] == plain["answer"]
    decision = edited["decision"]
    assert decision["nearest"] in {r.id for r in REQUESTS} and decision["nearest_target_new"]
    assert decision["in_scope"] == (decision["edit"] is not None) == (decision["distance"] <= decision["radius"])
    out = run("ask", "2 + 2 =", "--model", place.model, "--patch", place.patch, "--max-new-tokens", "3")
    assert out.exit_code == 0 and "at distance" in out.stderr and "distance" not in out.stdout


def test_a_patch_changes_the_answer(place: SimpleNamespace, tmp_path: Path) -> None:
    """An edit by hand, as a random model obeys no context that a fit could learn from."""
    model, tokenizer = errata.load(place.model)
    prompt, target = tokenizer("The capital of France is")["input_ids"], tuple(tokenizer(" Goa.")["input_ids"])
    part = steering_part(model, prompt, target, gate=Gate(layers=(0,)))
    Patch("hand", {}, (), base_of(model, tokenizer), (part,)).save(tmp_path / "hand.safetensors")
    command = ["ask", "The capital of France is", "--model", place.model, "--patch", tmp_path / "hand.safetensors"]
    value = json_of(run(*command, "--json"))
    assert value["text"].startswith(" Goa.") and not value["unedited_answer"].startswith("Goa")
    assert value["decision"]["in_scope"] and value["decision"]["edit"] == part.edit
    assert run(*command).stdout.startswith("Goa")


def test_two_patches_about_one_thing_are_reported(place: SimpleNamespace, tmp_path: Path) -> None:
    write_requests(tmp_path / "again.jsonl", [REQUESTS[0].model_copy(update={"target_new": "Nice"})])
    again = tmp_path / "again.safetensors"
    assert run("fit", tmp_path / "again.jsonl", "-m", place.model, "-o", again, *SMALL).exit_code == 0
    asked = run("ask", REQUESTS[0].text, "-m", place.model, "-p", place.patch, "-p", again, "--json")
    assert json_of(asked)["conflicts"][0][1] == REQUESTS[0].id and "overrides" in asked.stderr


# -- fit -----------------------------------------------------------------------------------------------------------------


def test_a_fit_one_by_one_equals_one_fit_of_all(place: SimpleNamespace) -> None:
    model, tokenizer = errata.load(place.model)
    whole = SAKE(prompts=6, context_prompts=3, implication_prompts=3).fit(model, tokenizer, REQUESTS, seed=0)
    assert whole.to_bytes() == Path(place.patch).read_bytes()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RequestError("row 3 cannot be fitted")])
def test_a_stopped_fit_goes_on_to_the_same_bytes(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    path, partial = tmp_path / "patch.safetensors", tmp_path / "patch.safetensors.partial"
    command = ["fit", place.requests, "--model", place.model, "--out", str(path), *SMALL]
    with monkeypatch.context() as patched:
        _stop_after(patched, 2, stop)
        stopped = run(*command)
    assert stopped.exit_code == (130 if stop is KeyboardInterrupt else 2) and stopped.stdout == ""
    if stop is KeyboardInterrupt:
        [line] = stopped.stderr.splitlines()
        assert str(partial) in line and "again to go on" in line
    assert not path.exists() and len(load_patch(partial)) == 2
    assert "another seed" in refused(run(*command, "--seed", "1"))
    assert "another configuration" in refused(run(*command, "--set", "reg=0.1"))
    assert "another model" in refused(run("fit", place.requests, "-m", place.other, "-o", path, *SMALL))
    other = tmp_path / "other.jsonl"
    write_requests(other, REQUESTS[1:])
    assert "another requests" in refused(run("fit", other, "-m", place.model, "-o", path, *SMALL))
    resumed = run(*command, "--json")
    value = json_of(resumed)
    assert (value["n_edits"], value["n_resumed"]) == (4, 2) and "going on after 2 of 4" in resumed.stderr
    assert path.read_bytes() == Path(place.patch).read_bytes() and not partial.exists()


def test_a_stopped_stream_goes_on_from_what_it_holds(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRACE, an edit at a time: each one knows the keys before it, also where the fit was stopped between them."""
    twice = [*REQUESTS, REQUESTS[0].model_copy(update={"target_new": "Lima"})]
    write_requests(tmp_path / "r.jsonl", twice)
    options = ["steps=3", "layer=0", "radius=0.01"]
    command = ["fit", tmp_path / "r.jsonl", "-m", place.model, "--method", "grace", "--batch", "1"]
    command += [word for option in options for word in ("--set", option)]
    whole, parted = tmp_path / "whole.safetensors", tmp_path / "parted.safetensors"
    assert run(*command, "-o", whole).exit_code == 0
    with monkeypatch.context() as patched:
        _stop_after(patched, 2, KeyboardInterrupt, GRACE)
        assert run(*command, "-o", parted).exit_code == 130
    assert json_of(run(*command, "-o", parted, "--json"))["n_resumed"] == 2
    assert whole.read_bytes() == parted.read_bytes()
    first, *_, last = (patch := load_patch(whole)).ids
    assert patch.report[last]["replaced"] == [first] == patch.report[last]["contradicts"]
    assert patch.report[first]["overruled"] == [last] and not patch.report[first]["converged"]


def _stop_after(patched: pytest.MonkeyPatch, n: int, stop: Any, editor: Any = SAKE) -> None:
    original, calls = editor.fit, [0]

    def fit(*args: Any, **kwargs: Any) -> Patch:
        calls[0] += 1
        if calls[0] > n:
            raise stop
        return original(*args, **kwargs)

    patched.setattr(editor, "fit", fit)


def test_an_interrupt_before_the_first_edit_keeps_nothing(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_after(monkeypatch, 0, KeyboardInterrupt)
    result = run("fit", place.requests, "-m", place.model, "-o", tmp_path / "p.safetensors", *SMALL)
    assert result.exit_code == 130 and "no edit was finished" in result.stderr and not list(tmp_path.iterdir())


def test_an_unknown_old_object_is_filled_in_and_still_resumes(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [r.model_copy(update={"target_true": None}) for r in REQUESTS[:2]]
    write_requests(tmp_path / "r.jsonl", requests)
    command = ["fit", tmp_path / "r.jsonl", "-m", place.model, "-o", tmp_path / "p.safetensors", *SMALL]
    with monkeypatch.context() as patched:
        _stop_after(patched, 1, KeyboardInterrupt)
        assert run(*command).exit_code == 130
    assert json_of(run(*command, "--json"))["n_resumed"] == 1
    assert all(r.target_true for r in load_patch(tmp_path / "p.safetensors").requests)


def test_bare_and_unconverged_edits_are_noticed(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SAKE.fit

    def fit(*args: Any, **kwargs: Any) -> Patch:
        patch = original(*args, **kwargs)
        patch.report[patch.ids[0]]["converged"] = False
        return patch

    monkeypatch.setattr(SAKE, "fit", fit)
    write_requests(tmp_path / "r.jsonl", [REQUESTS[0].model_copy(update={"fit_prompts": ()})])
    result = run("fit", tmp_path / "r.jsonl", "-m", place.model, "-o", tmp_path / "p.safetensors", *SMALL, "--json")
    assert len(json_of(result)["unconverged"]) == 1
    assert "did not converge" in result.stderr and "no fit_prompts" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "sakke"], "no editing method 'sakke'; did you mean sake"),
        (["--preset", "nope"], "no preset 'nope'"),
        (["--set", "promts=5"], "no option 'promts'; did you mean 'prompts'"),
        (["--set", "prompts=many"], "expected prompts to be of type int, found 'many'"),
        (["--set", "prompts"], "expected --set NAME=VALUE"),
        (["--set", "map=circular"], "expected map to be of type"),
        (["--dtype", "int3"], "expected dtype"),
    ],
)
def test_bad_options_of_a_fit(place: SimpleNamespace, tmp_path: Path, options: list[str], message: str) -> None:
    out = tmp_path / "p.safetensors"
    assert message in refused(run("fit", place.requests, "--model", place.model, "--out", out, *options))
    assert not list(tmp_path.iterdir())


def test_settings_are_read_by_type(place: SimpleNamespace, tmp_path: Path) -> None:
    out, options = tmp_path / "p.safetensors", ["--set", "layer=1", "--set", "affirm=False", "--set", "radius=none"]
    write_requests(tmp_path / "r.jsonl", REQUESTS[:1])
    value = json_of(run("fit", tmp_path / "r.jsonl", "-m", place.model, "-o", out, *SMALL, *options, "--json"))
    config = value["config"]
    assert (config["layer"], config["affirm"], config["radius"], config["prompts"]) == (1, False, None, 6)


# -- bad input -----------------------------------------------------------------------------------------------------------


def test_an_unknown_model_names_its_neighbour(atlas: str) -> None:
    assert "did you mean 'atlas'?" in refused(run("ask", "Paris is", "--model", "atlaz"))


def test_bad_requests(place: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "p.safetensors"
    assert "No such file" in refused(run("fit", tmp_path / "none.jsonl", "-m", place.model, "-o", out))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "{} is", "subject": "A", "target_new": ""}\n')
    assert "row 1: target_new is empty" in refused(run("fit", tmp_path / "bad.jsonl", "-m", place.model, "-o", out))
    (tmp_path / "empty.jsonl").write_text("")
    assert "at least one edit request" in refused(run("fit", tmp_path / "empty.jsonl", "-m", place.model, "-o", out))
    assert "directory" in refused(run("fit", place.requests, "-m", place.model, "-o", tmp_path))


@pytest.mark.parametrize("command", ["show", "ask", "verify"])
def test_bad_patches(place: SimpleNamespace, tmp_path: Path, command: str) -> None:
    def result(path: str | Path) -> Result:
        rest = ["--model", place.model, "--patch", path]
        return run("show", path) if command == "show" else run(command, *(["Hi"] if command == "ask" else []), *rest)

    data = Path(place.patch).read_bytes()
    cut, altered, text = (tmp_path / name for name in ("cut", "altered", "text"))
    cut.write_bytes(data[: len(data) // 2])
    altered.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    text.write_text("hello")
    assert "truncated or damaged" in refused(result(cut))
    assert "has been altered" in refused(result(altered))
    assert "not a readable safetensors file" in refused(result(text))
    assert "cannot read the patch" in refused(result(tmp_path / "none"))


@pytest.mark.parametrize("command", [["ask", "Hi"], ["verify", "--unrelated", "0"]])
def test_a_patch_for_another_model(place: SimpleNamespace, command: list[str]) -> None:
    assert "on which the patch was fitted" in refused(run(*command, "--model", place.other, "--patch", place.patch))


def test_a_folder_that_cannot_be_written_is_refused_before_the_fit(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stop_after(monkeypatch, 0, AssertionError("a fit was begun"))
    (tmp_path / "file").write_text("in the way")
    command = ["fit", place.requests, "-m", place.model, *SMALL, "-o"]
    for path in (tmp_path / "file" / "p.safetensors", tmp_path / "file" / "deeper" / "p.safetensors"):
        assert f"cannot write {path}: Not a directory" in refused(run(*command, path))
    assert "cannot write" in refused(
        run("verify", "-m", place.model, "-p", place.patch, "--rows", tmp_path / "file" / "r.jsonl")
    )

    def denied(*_: Any, **options: Any) -> Any:
        assert options["dir"] == tmp_path  # the nearest folder that exists
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    assert "Permission denied" in refused(run(*command, tmp_path / "new" / "folder" / "p.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_prompt_that_is_too_long(place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, words = "word " * 1000, "the prompt 'word word"
    said = refused(run("ask", long, "-m", place.model))
    assert words in said and "16 more are to follow" in said and "room for 1024" in said
    (tmp_path / "r.jsonl").write_text(
        "".join(r.model_copy(update={"paraphrase_prompts": (long,)}).to_json() + "\n" for r in REQUESTS)
    )
    verified = run("verify", "-m", place.model, "-p", place.patch, "--requests", tmp_path / "r.jsonl", "--unrelated", 0)
    assert words in refused(verified)
    (tmp_path / "texts").write_text(long)
    verified = run("verify", "-m", place.model, "-p", place.patch, "--texts", tmp_path / "texts")
    assert words in refused(verified)
    _stop_after(monkeypatch, 0, AssertionError("a fit was begun"))
    write_requests(tmp_path / "r.jsonl", [*REQUESTS, REQUESTS[0].model_copy(update={"fit_prompts": (long,)})])
    for command in (
        ["fit", tmp_path / "r.jsonl", "-o", tmp_path / "p"],
        ["verify", "--requests", tmp_path / "r.jsonl"],
    ):
        assert words in refused(run(*command, "-m", place.model, "--method", "sake", *SMALL))


def test_a_subject_that_the_tokenizer_drops(
    place: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _bpe: str
) -> None:
    backend = Tokenizer.from_str(_bpe)
    backend.normalizer = normalizers.Replace("\u2603", "")
    tiny_model("gpt2", n_positions=1024).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(tmp_path / "model")
    _stop_after(monkeypatch, 0, AssertionError("a fit was begun"))
    write_requests(
        tmp_path / "r.jsonl",
        [*REQUESTS, EditRequest(subject="\u2603", prompt="The sign {} means", target_new="snow", target_true="sun")],
    )
    for command in (
        ["fit", tmp_path / "r.jsonl", "-o", tmp_path / "p"],
        ["verify", "--requests", tmp_path / "r.jsonl"],
    ):
        said = refused(run(*command, "-m", tmp_path / "model", "--method", "sake", *SMALL))
        assert "expected tokens for the subject '\u2603' in the prompt 'The sign \u2603 means'" in said


def test_two_edits_of_one_thing_are_noticed(place: SimpleNamespace, tmp_path: Path) -> None:
    again = REQUESTS[0].model_copy(update={"target_new": "Nice", "subject": "the needle"})
    write_requests(tmp_path / "r.jsonl", [REQUESTS[0], REQUESTS[1], again])
    path = tmp_path / "p.safetensors"
    fitted = run("fit", tmp_path / "r.jsonl", "-m", place.model, "-o", path, *SMALL, "--json")
    verified = run("verify", "-m", place.model, "-p", path, "--unrelated", 0, "--json")
    for result in (fitted, verified):
        assert json_of(result)["conflicts"] == [[again.id, REQUESTS[0].id]]
        [line] = [line for line in result.stderr.splitlines() if "the later one wins" in line]
        assert (
            f"{REQUESTS[0].id} (The Needle is in -> Goa)" in line and f"{again.id} (the needle is in -> Nice)" in line
        )
    assert json_of(run("verify", "-m", place.model, "-p", place.patch, "--unrelated", 0, "--json"))["conflicts"] == []


# -- chat templates ------------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}Q: {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} A:{% endif %}"


@pytest.fixture
def chatty(place: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A model with a chat template, and a patch by hand whose gate opens behind the wrapped prompts only."""
    model, tokenizer = errata.load(place.model)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    model, tokenizer = errata.load(folder)
    request = REQUESTS[0].model_copy(update={"paraphrase_prompts": (), "neighborhood_prompts": ()})
    prompt, target = tokenizer(f"Q: {request.text} A:")["input_ids"], tuple(tokenizer(" Goa.")["input_ids"])
    part = steering_part(model, prompt, target, gate=Gate(layers=(0,)), edit=request.id, key=request.key)
    path = tmp_path / "patch.safetensors"
    Patch("hand", {"chat": True}, (request,), base_of(model, tokenizer), (part,)).save(path)
    return SimpleNamespace(model=folder, patch=str(path), prompt=request.text)


def test_a_patch_fitted_on_chat_prompts_is_asked_with_them(chatty: SimpleNamespace) -> None:
    command = ["ask", chatty.prompt, "-m", chatty.model, "--json"]
    edited = json_of(run(*command, "-p", chatty.patch))
    assert edited["chat"] and edited["text"].startswith(" Goa.") and edited["decision"]["in_scope"]
    assert edited["prompt"] == chatty.prompt
    plain = run(*command, "-p", chatty.patch, "--no-chat")
    assert not json_of(plain)["decision"]["in_scope"] and "asked without the chat template" in plain.stderr
    wrapped, bare = json_of(run(*command, "--chat")), json_of(run(*command))
    assert (wrapped["chat"], bare["chat"]) == (True, False) and wrapped["text"] != bare["text"]
    assert wrapped["answer"] == edited["unedited_answer"]


def test_chat_needs_a_template(place: SimpleNamespace) -> None:
    assert "expected a tokenizer with a chat template" in refused(run("ask", "Hi", "-m", place.model, "--chat"))


def test_a_patch_fitted_on_chat_prompts_is_verified_with_them(chatty: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text(chatty.prompt)
    value = json_of(run("verify", "-m", chatty.model, "-p", chatty.patch, "--texts", tmp_path / "texts", "--json"))
    assert value["efficacy"]["value"] == 1.0 and value["restored"]
    assert value["locality"]["value"] == 0.0  # the edit's own prompt as an unrelated text: wrapped as well
    assert all(value[m]["protocol"].endswith("in the chat template") for m in ("efficacy", "locality"))


# -- verify --------------------------------------------------------------------------------------------------------------

FIGURE = {"value", "low", "high", "n", "protocol"}


def test_verify_a_patch(place: SimpleNamespace, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    command = ["verify", "--model", place.model, "--patch", place.patch, "--unrelated", "6", "--rows", str(rows)]
    value = json_of(run(*command, "--threads", "1", "--json"))
    assert value["n_edits"] == 4 and value["model"] == place.model and value["seconds_fit_per_edit"] is None
    for metric, n in (("efficacy", 4), ("generalization", 4), ("specificity", 4), ("locality", 6)):
        assert set(value[metric]) >= FIGURE and value[metric]["n"] == n
        assert 0 <= value[metric]["low"] <= value[metric]["value"] <= value[metric]["high"] <= 1
    assert value["restored"] is True
    assert value["by_relation"]["city"]["n_edits"] == 4
    assert (value["dtype"], value["threads"], value["seed"]) == ("float32", 1, 0) and value["versions"]["torch"]
    assert len(rows.read_text().splitlines()) == value["n_failures"]
    printed = run(*command)
    assert printed.exit_code == 0 and "efficacy" in printed.stdout and "bit for bit" in printed.stdout


def test_figures_without_probes_are_null_with_a_reason(place: SimpleNamespace, tmp_path: Path) -> None:
    bare = {"paraphrase_prompts": (), "neighborhood_prompts": ()}
    write_requests(tmp_path / "r.jsonl", [REQUESTS[0].model_copy(update=bare)])
    command = ["verify", "--model", place.model, "--method", "sake", "--requests", str(tmp_path / "r.jsonl"), *SMALL]
    value = json_of(run(*command, "--unrelated", "0", "--json"))
    for metric in ("generalization", "specificity", "locality"):
        assert value[metric]["value"] is None and value[metric]["reason"]
    assert value["efficacy"]["n"] == 1 and value["seconds_fit_per_edit"] > 0
    failed = run(*command, "--unrelated", "0", "--min-generalization", "0.5")
    assert failed.exit_code == 1 and "generalization is -, below 50.0%" in failed.stderr


def test_a_minimum_that_is_met_and_one_that_is_not(place: SimpleNamespace) -> None:
    narrow = ["--method", "sake", "--requests", place.requests, *SMALL, "--set", "radius=1e-6"]
    common = ["verify", "--model", place.model, "--unrelated", "2", "--json"]
    least = ["--min-locality", "1", "--min-specificity", "1", "--min-efficacy", "0"]
    assert run(*common, *narrow, *least).exit_code == 0  # no gate opens, so nothing moves
    command = [*common, "--patch", place.patch]
    (place.folder / "probes.jsonl").write_text(
        "".join(r.model_copy(update={"paraphrase_prompts": ("Blue is",)}).to_json() + "\n" for r in REQUESTS)
    )
    failed = run(*command, "--requests", place.folder / "probes.jsonl", "--min-generalization", "0.9")
    value = json.loads(failed.stdout)
    assert failed.exit_code == 1 and value["below_minimum"] == ["generalization"]


def test_verify_needs_one_thing_to_verify(place: SimpleNamespace) -> None:
    assert "found neither" in refused(run("verify", "--model", place.model))
    both = run("verify", "--model", place.model, "--patch", place.patch, "--method", "sake")
    assert "found --patch and --method" in refused(both)
    assert "give --requests" in refused(run("verify", "--model", place.model, "--method", "sake"))


def test_verify_counterfactual_edits_of_atlas(atlas: str) -> None:
    command = ["verify", "--model", atlas, "--method", "sake", "--n", "2", "--seed", "3", "--unrelated", "4", *SMALL]
    value = json_of(run(*command, "--json"))
    assert value["n_edits"] == 2 and value["model"] == "atlas" and value["seed"] == 3
    assert all(value[m]["value"] is not None for m in ("efficacy", "generalization", "specificity", "locality"))


# -- calibrate and demo --------------------------------------------------------------------------------------------------


def _never_restored(patched: pytest.MonkeyPatch) -> None:
    from errata.bench import verify as module

    original = module.verify
    patched.setattr(module, "verify", lambda *args, **kwargs: original(*args, **kwargs) | {"restored": False})


def test_a_model_that_is_not_restored_is_a_failure(
    place: SimpleNamespace, atlas: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _never_restored(monkeypatch)
    verified = run("verify", "-m", place.model, "-p", place.patch, "--unrelated", 0, "--json")
    assert verified.exit_code == 1 and json.loads(verified.stdout)["restored"] is False
    assert "after detaching, the logits are not what they were" in verified.stderr
    shown = run("demo", "--n", 2, "--json")
    assert shown.exit_code == 1 and json.loads(shown.stdout)["restored"] is False


def test_calibrate_on_requests(place: SimpleNamespace, tmp_path: Path) -> None:
    names = ("Ada", "Ben", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jim", "Kay", "Leo")
    prompts = ("{} lives in", "The home of {} is in", "You find {} in", "Go and see {} in", "Now {} stays in")
    write_requests(
        tmp_path / "r.jsonl",
        [
            EditRequest(subject=s, prompt=p[0], target_new="Goa", fit_prompts=[q.replace("{}", s) for q in p])
            for s, p in ((name, prompts) for name in names)
        ],
    )
    gate = tmp_path / "gate.safetensors"
    command = [
        "calibrate",
        "--model",
        place.model,
        "--requests",
        tmp_path / "r.jsonl",
        "--out",
        gate,
        "--unrelated",
        "4",
    ]
    value = json_of(run(*command, "--json"))
    assert value["n_examples"] == 12 and value["chosen"] == value["candidates"][0] and value["why"]
    assert load_gate(gate).radius == pytest.approx(value["chosen"]["radius"])
    assert "chosen:" in run(*command).stdout
    out = tmp_path / "p.safetensors"
    assert run("fit", place.requests, "-m", place.model, "-o", out, *SMALL, "--set", f"gate={gate}").exit_code == 0


def test_calibrate_on_atlas(atlas: str, place: SimpleNamespace, tmp_path: Path) -> None:
    gate = tmp_path / "gate.safetensors"
    command = ["calibrate", "--out", gate, "--n", "12", "--unrelated", "2", "--json"]
    assert json_of(run(*command, "--model", atlas))["n_examples"] == 12
    assert "give --requests" in refused(run(*command, "--model", place.model))


def test_demo(atlas: str) -> None:
    value = json_of(run("demo", "--n", "2", "--json"))
    assert set(value) == {"model", "edits", "summary", "restored", "seconds"}
    assert all(set(edit) == {"subject", "prompt", "target_new", "before", "after"} for edit in value["edits"])
    assert set(value["summary"]) == {"n_edits", "efficacy", "generalization", "specificity"}
    assert (value["model"], value["restored"], value["summary"]["n_edits"], len(value["edits"])) == (
        "atlas",
        True,
        2,
        2,
    )


def test_the_demo_tells_its_story(atlas: str) -> None:
    result = run("demo", "--n", "2")
    assert result.exit_code == 0, result.output
    for words in ("1. ", "2. ", "3. ", "4. ", "5. ", "taken back", "bit for bit"):
        assert words in result.stdout
