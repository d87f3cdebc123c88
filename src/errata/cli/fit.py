"""`errata fit`: requests in, a patch file out; interrupted, it keeps what is done and goes on when repeated."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from errata.cli.common import (
    INTERRUPTED,
    ConfigFile,
    DeviceMap,
    Dtype,
    Json,
    Model,
    Preset,
    Seed,
    Settings,
    Threads,
    bar,
    emit,
    load,
    notice,
    notice_conflicts,
    out,
    writable,
)
from errata.edit import EditRequest, read_requests
from errata.errors import BaseMismatchError, ConfigError, EditError, RequestError


class Prompts(StrEnum):
    """Sources of in-scope prompts."""

    given = "given"
    phrasings = "phrasings"
    agentic = "agentic"


RESUME = "resume"  # where a partial patch's report keeps what the patch itself does not say
KEEP_EVERY = 5  # edits between two writes of the partial patch


def fit(
    requests: Annotated[Path, typer.Argument(help="Edit requests (JSONL or a JSON array; CounterFact records too).")],
    model: Model,
    out_path: Annotated[Path, typer.Option("--out", "-o", help="The patch file to write.")],
    method: Annotated[str, typer.Option("--method", help="`errata methods` lists them.")] = "sake",
    preset: Preset = None,
    config: ConfigFile = None,
    settings: Settings = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Edits fitted at once (default: the method's own; joint methods: all).")
    ] = None,
    seed: Seed = 0,
    prompts: Annotated[
        Prompts,
        typer.Option(
            help="Where in-scope prompts come from: the file, Atlas's phrasings, or a language-model endpoint."
        ),
    ] = Prompts.given,
    rounds: Annotated[
        int, typer.Option(min=0, help="With agentic prompts: rounds of refining what the edit misses.")
    ] = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Fit edit requests and write one patch file.

    Agentic prompts come from an OpenAI-compatible endpoint: ERRATA_BASE_URL, ERRATA_LLM (the model's name) and
    ERRATA_API_KEY, each falling back on OPENAI_BASE_URL and OPENAI_API_KEY; replies are cached on disk.

    Finished edits are kept in OUT.partial. After Ctrl-C, or an error in one request, the same command goes on where it
    stopped, and its patch has the same bytes as one fitted in a single run. A method that writes all edits jointly (MEMIT,
    EMMET) has none finished before the last, and begins anew; it is fitted on at most --batch edits at a time, each batch on
    top of those before it.
    """
    editor = make_editor(method, preset, settings, config)
    if editor.joint and batch:
        editor = with_batch(editor, batch)
    asked = read_requests(requests)
    editor.check(asked)
    overridden = notice_conflicts(asked)
    if prompts is Prompts.phrasings:
        asked = [phrased(request) for request in asked]
    partial = writable(out_path).with_name(out_path.name + ".partial")
    loaded, tokenizer = load(model, dtype, device_map, threads)
    editor.check(asked, loaded, tokenizer)
    if prompts is Prompts.agentic:
        asked = written(editor, loaded, tokenizer, asked, seed, rounds)
    started = time.perf_counter()
    many = batch or editor.batch
    done = None if editor.joint else resumed(editor, loaded, tokenizer, asked, seed, partial, many)
    if done:
        notice(f"going on after {len(done)} of {len(asked)} edits kept in {partial}")
    try:
        with bar(f"fitting with {method}", len(asked)) as progress:
            if editor.joint:
                patch = editor.fit(loaded, tokenizer, asked, seed=seed, progress=lambda n, _: progress(n))
            else:
                patch = fit_resumably(editor, loaded, tokenizer, asked, seed, partial, done, progress, many)
    except KeyboardInterrupt:
        kept = f"finished edits are kept in {partial}" if partial.exists() else "no edit was finished yet"
        if editor.joint:
            kept = f"{method} writes all edits at once, so nothing is kept"
        notice(f"interrupted; {kept}; give the same command again to {'begin anew' if editor.joint else 'go on'}")
        raise typer.Exit(INTERRUPTED) from None
    except EditError:
        if partial.exists():
            where = "stands next" if many == 1 else f"is among the next {many}"
            notice(f"finished edits are kept in {partial}; correct the request, which {where}, and repeat the command")
        raise
    patch.save(out_path)
    if not editor.joint:
        partial.unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    _report(patch, out_path, model, seed, len(done) if done else 0, seconds, overridden, json_output)


def _report(
    patch: Any, path: Path, model: str, seed: int, before: int, seconds: float, overridden: list[list[str]],
    json_output: bool,
) -> None:  # fmt: skip
    unconverged = [i for i in patch.ids if not patch.report[i].get("converged", True)]
    bare = sum("lead-ins" in str(patch.report[i].get("prompts_from", "")) for i in patch.ids)
    if bare:
        notice(
            f"{bare} requests have no fit_prompts and were fitted on lead-ins over the bare prompt; phrasings do better"
        )
    if unconverged:
        names = ", ".join(unconverged[:5]) + (", ..." if len(unconverged) > 5 else "")
        notice(
            f"warning: {len(unconverged)} of {len(patch)} edits did not converge ({names}); `errata verify` tells more"
        )
    fitted = len(patch) - before
    value = {
        "out": str(path),
        "patch": patch.id,
        "model": model,
        "method": patch.method,
        "config": patch.config,
        "seed": seed,
        "n_edits": len(patch),
        "n_resumed": before,
        "unconverged": unconverged,
        "conflicts": overridden,
        "bytes": path.stat().st_size,
        "seconds": round(seconds, 3),
        "seconds_fit_per_edit": round(seconds / fitted, 4) if fitted else None,
    }
    if json_output:
        emit(value)
        return
    pace = f", {seconds / fitted:.2f} s each" if fitted else ""
    text = f"{len(patch)} edits fitted with {patch.method}{pace}; {path} ({value['bytes']:,} bytes)"
    out().print(text, markup=False, soft_wrap=True)


# -- editors and their settings ------------------------------------------------------------------------------------------


def make_editor(method: str, preset: str | None, settings: Sequence[str] | None, config: Path | None = None) -> Any:
    """The editor of a method, with a preset, a file of `errata tune` and `NAME=VALUE` settings, the later over the earlier.

    Raises ConfigError, UnknownEditorError.
    """
    from errata.editors import get_editor

    editor = get_editor(method)
    changes = (options_of(config, editor) if config else {}) | _changes(editor.Config, settings or ())
    return editor.preset(preset, **changes) if preset else editor(**changes)


def options_of(path: Path, editor: Any) -> dict[str, Any]:
    """The options that a file holds for a method: {"method", "options"}, as `errata tune` writes it. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"expected a JSON file of options at {path}, as `errata tune` writes it: {error}") from None
    options = value.get("options") if isinstance(value, dict) else None
    if not isinstance(options, dict):
        raise ConfigError(f'expected {{"method": ..., "options": {{...}}}} in {path}, as `errata tune` writes it')
    if value.get("method", editor.method) != editor.method:
        raise ConfigError(f"{path} holds options of {value['method']}, not of {editor.method}; name that --method")
    return _changes(
        editor.Config, [f"{name}={v if isinstance(v, str) else json.dumps(v)}" for name, v in options.items()]
    )


def with_batch(editor: Any, batch: int) -> Any:
    """A joint editor that writes so many edits at a time. Raises ConfigError if the method has no such option."""
    return type(editor)(editor.config, batch_size=batch)


def _changes(config: type[Any], settings: Sequence[str]) -> dict[str, Any]:
    hints = get_type_hints(config)
    changes = {}
    for pair in settings:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"expected --set NAME=VALUE, found {pair!r}")
        changes[name.strip()] = _value(
            name.strip(), text.strip(), hints.get(name.strip(), bool | int | float | str | None)
        )
    return changes


def _value(name: str, text: str, hint: Any) -> Any:
    """The text as a value of the field's type: as JSON where that fits (3, 0.5, true, null), else as it stands."""
    from pydantic import TypeAdapter, ValidationError

    kind = TypeAdapter(hint)
    spelled = {"none": "null", "true": "true", "false": "false"}.get(text.lower(), text)
    for read, given in ((kind.validate_json, spelled), (kind.validate_python, text)):
        try:
            return read(given, strict=True)
        except ValidationError:
            continue
    wanted = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ConfigError(f"expected {name} to be of type {wanted}, found {text!r}")


# -- where prompts come from ---------------------------------------------------------------------------------------------


def phrased(request: EditRequest) -> EditRequest:
    """The request with Atlas's `fit` phrasings and implications. Raises RequestError if Atlas has no such fact."""
    from errata.atlas.probes import fact_of
    from errata.atlas.requests import request_for
    from errata.atlas.world import load_world

    world = load_world()
    fact = fact_of(world, request)
    if fact is None:
        raise RequestError(
            f"Atlas has no fact about {request.subject!r} with the relation {request.relation!r}; use --prompts given"
        )
    full = request_for(world, fact, request.target_new)
    return request.model_copy(
        update={
            "fit_prompts": tuple(dict.fromkeys((*request.fit_prompts, *full.fit_prompts))),
            "fit_implications": request.fit_implications or full.fit_implications,
        }
    )


def written(
    editor: Any, model: Any, tokenizer: Any, requests: Sequence[EditRequest], seed: int, rounds: int
) -> list[EditRequest]:
    """The requests with their old objects, and with prompts and implications written by the endpoint of the environment."""
    from errata.model.tokens import wrapper
    from errata.prompts.endpoint import Endpoint
    from errata.prompts.sources import agentic_source, misses, with_old_object

    wrap = wrapper(tokenizer, bool(getattr(editor.config, "chat", False)))
    judge = misses(model, tokenizer, lambda request: editor.fit(model, tokenizer, [request], seed=seed), wrap)
    source = agentic_source(
        Endpoint.from_environment(),
        seed=seed,
        rounds=rounds,
        judge=judge if rounds else None,
        resolve=lambda request: with_old_object(model, tokenizer, request, wrap),
    )
    with bar("writing prompts", len(requests)) as progress:
        found = []
        for number, request in enumerate(requests, 1):
            found.append(source(request))
            progress(number)
    return found


# -- fitting one by one --------------------------------------------------------------------------------------------------


def fit_resumably(
    editor: Any,
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    seed: int,
    partial: Path,
    done: Any = None,
    progress: Callable[[int], None] = lambda _: None,
    batch: int = 1,
) -> Any:
    """Fit what `done` (a patch of the first requests, or None) lacks, `batch` edits at a time, and join the patches.

    A method that takes streams goes on from the edits so far instead. Every few edits the finished ones go to `partial`, and at
    once if anything stops the work.
    """
    from errata.editors._items import later_wins, with_contradictions

    patch, kept, cost, last = done, len(done or ()), 0.0, time.perf_counter()
    progress(kept)
    gates = {part.gate.digest: part.gate for part in (*done.steering, *done.context) if part.gate} if done else {}
    try:
        for start in range(kept, len(requests), batch):
            chunk = requests[start : start + batch]

            def count(done: int, _: int, before: int = start) -> None:
                progress(before + done)

            if editor.streams and patch is not None:
                patch = editor.fit(model, tokenizer, chunk, seed=seed, progress=count, onto=patch)
            else:
                one = editor.fit(model, tokenizer, chunk, seed=seed, progress=count)
                # equal gates as one object: a thousand copies of a projection would fill the memory
                parts = tuple(
                    replace(part, gate=gates.setdefault(gate.digest, gate))
                    if (gate := getattr(part, "gate", None))
                    else part
                    for part in one.parts
                )
                one = replace(one, parts=parts)
                patch = one if patch is None else patch + one
                if editor.place != "external memory":
                    patch = later_wins(patch)  # also over an edit of a chunk before
            number = len(patch)
            progress(number)
            began = time.perf_counter()
            if number - kept >= KEEP_EVERY and began - last >= 10 * cost:  # writing never takes a tenth of the time
                _keep(patch, seed, batch, partial)
                kept, last = number, time.perf_counter()
                cost = last - began
    except BaseException:
        if len(patch or ()) > kept:
            _keep(patch, seed, batch, partial)
        raise
    return replace(patch, report=with_contradictions(patch.report, patch.requests))


def _keep(patch: Any, seed: int, batch: int, partial: Path) -> None:
    replace(patch, report=patch.report | {RESUME: {"seed": seed, "batch": batch}}).save(partial)


def resumed(
    editor: Any, model: Any, tokenizer: Any, requests: Sequence[EditRequest], seed: int, partial: Path, batch: int = 1
) -> Any:
    """The patch of the edits that an earlier run finished, or None. Raises ConfigError if that was another fit."""
    from errata.model.fingerprint import check_base
    from errata.patch import load_patch

    if not partial.exists():
        return None
    patch = load_patch(partial)
    config = json.loads(json.dumps(editor.recorded(model, tokenizer)))
    begun_with = patch.report.get(RESUME, {})
    begun = {
        "method": patch.method == editor.method,
        "configuration": patch.config == config,
        "seed": begun_with.get("seed") == seed,
        "batch": begun_with.get("batch", 1) == batch,
        "requests": len(patch) <= len(requests)
        and all(same_edit(asked, kept) for asked, kept in zip(requests, patch.requests, strict=False)),
    }
    try:
        check_base(patch.base, model, tokenizer)
    except BaseMismatchError:
        begun = {"model": False} | begun
    if other := [name for name, same in begun.items() if not same]:
        raise ConfigError(
            f"{partial} was begun with another {other[0]}; give the command that it was begun with to go on, "
            "or delete it to begin anew"
        )
    return replace(patch, report={k: v for k, v in patch.report.items() if k != RESUME})


def same_edit(asked: EditRequest, fitted: EditRequest) -> bool:
    """Whether a patch's request is what was asked for, when a fit may have filled in the model's own old answer."""
    if asked.target_true is None:
        fitted = fitted.model_copy(update={"target_true": None})
    return asked.id == fitted.id


def with_judges(fitted: Sequence[EditRequest], judges: Sequence[EditRequest]) -> list[EditRequest]:
    """A patch's requests with the probes that another file holds for them. Raises RequestError if it lacks one."""
    found = []
    for request in fitted:
        judge = next((j for j in judges if same_edit(j, request)), None)
        if judge is None:
            raise RequestError(
                f"the requests file has no row for the patch's edit {request.id} ({request.text!r}); add it"
            )
        probes = {name: getattr(judge, name) for name in ("paraphrase_prompts", "neighborhood_prompts")}
        found.append(request.model_copy(update=probes))
    return found
