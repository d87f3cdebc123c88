"""`errata ask`, `show`, `methods` and `updates`: looking at answers, patches and what there is."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import DeviceMap, Dtype, Json, Model, Threads, emit, err, load, notice, out, row, table
from errata.errors import EditError

ANSWER_TOKENS = 16


def ask(
    prompt: Annotated[str, typer.Argument(help='A prompt to be completed, such as "The Space Needle is in".')],
    model: Model,
    patch: Annotated[list[Path] | None, typer.Option("--patch", "-p", help="A patch to attach; repeatable.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Generate so many tokens and show them all (default: the answer only).")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask as a user's turn of the chat template (default: where a patch was fitted with chat=true).",
        ),
    ] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Ask a model, greedily; with steering patches, tell which edit the gate chose and how far the prompt was from it."""
    from errata.model.generate import cut, greedy
    from errata.model.tokens import wrapper
    from errata.patch import decide, load_patch

    if not prompt.strip():
        raise EditError("the prompt is empty; give a text to be completed")
    patches = [load_patch(path) for path in patch or ()]
    loaded, tokenizer = load(model, dtype, device_map, threads)
    length = max_new_tokens or ANSWER_TOKENS
    fitted = {bool(p.config.get("chat")) for p in patches}
    wrapped = any(fitted) if chat is None else chat
    if fitted - {wrapped}:
        how = "with" if wrapped else "without"
        notice(f"asked {how} the chat template, but a patch was fitted the other way; its edits may not apply")
    text_asked = wrapper(tokenizer, wrapped)(prompt)
    [unedited] = greedy(loaded, tokenizer, [text_asked], length)
    text, decision, conflicts = unedited, None, []
    with ExitStack() as stack:
        handles = [stack.enter_context(p.attach(loaded, tokenizer)) for p in patches]
        if handles:
            [text] = greedy(loaded, tokenizer, [text_asked], length)
            if decided := decide(loaded, [text_asked]):  # edits of weights have no scope to decide about
                decision = _decision(patches, decided[0])
            conflicts = sorted({pair for handle in handles for pair in handle.conflicts})
    in_weights = {edit for p in patches for part in p.low_rank for edit in part.edits}
    for later, earlier in conflicts:
        how = "and" if {later, earlier} <= in_weights else "overrides"
        both = "; both act on the weights" if how == "and" else ""
        notice(f"edit {later} {how} edit {earlier}: they are about the same subject and relation{both}")
    value = {
        "model": model,
        "patches": [str(p) for p in patch or ()],
        "prompt": prompt,
        "chat": wrapped,
        "answer": cut(text),
        "text": text,
        "unedited_answer": cut(unedited),
        "decision": decision,
        "conflicts": [list(pair) for pair in conflicts],
    }
    if json_output:
        emit(value)
        return
    out().print(text.strip() if max_new_tokens else cut(text), markup=False, soft_wrap=True)
    if decision:
        err().print(_words(decision), markup=False, soft_wrap=True, style="dim")


def _decision(patches: Sequence[Any], decision: Any) -> dict[str, Any]:
    """What the gate decided at the prompt's last token. distance and radius in the gate's unit."""
    known = {request.id: request for p in patches for request in p.requests}
    nearest = known.get(decision.nearest)
    return {
        "in_scope": decision.edit is not None,
        "edit": decision.edit,
        "nearest": decision.nearest,
        "nearest_prompt": nearest.text if nearest else None,
        "nearest_target_new": nearest.target_new if nearest else None,
        "distance": decision.distance,
        "radius": decision.radius,
    }


def _words(d: dict[str, Any]) -> str:
    about = f"edit {d['nearest']} ({d['nearest_prompt']} -> {d['nearest_target_new']})"
    far = f"at distance {d['distance']:.3g}, radius {d['radius']:.3g}"
    return f"{about} applies: {far}" if d["in_scope"] else f"no edit applies; the nearest is {about}, {far}"


def show(
    patch: Annotated[Path, typer.Argument(help="A patch file.")],
    json_output: Json = False,
) -> None:
    """List the edits of a patch file."""
    from errata.patch import FORMAT_VERSION, load_patch

    loaded = load_patch(patch)
    edits = [_edit(loaded, request) for request in loaded.requests]
    value = {
        "file": str(patch),
        "patch": loaded.id,
        "format": "errata.patch",
        "format_version": FORMAT_VERSION,
        "method": loaded.method,
        "config": loaded.config,
        "base": loaded.base,
        "bytes": patch.stat().st_size,
        "n_edits": len(loaded),
        "edits": edits,
    }
    if json_output:
        emit(value)
        return
    _print_edits(edits, steering=bool(loaded.steering), weights=bool(loaded.low_rank))
    base = loaded.base
    sizes = ", ".join(
        f"{name} {base[name]}" for name in ("family", "d_model", "n_layers", "vocab_size") if name in base
    )
    text = (
        f"{len(loaded)} edits by {loaded.method}; patch {loaded.id}, format {FORMAT_VERSION}, {value['bytes']:,} bytes"
    )
    out().print(f"{text}\nfitted on {sizes}", markup=False, soft_wrap=True)


def _edit(patch: Any, request: Any) -> dict[str, Any]:
    """One edit's line: its steering parts (its own first, its implications after it), its columns in weights, its context.

    bytes: without the gate that edits share. rank: of each step's map, or the columns at each of `layers`; norm: Frobenius
    norm of the edit's own update of weights, over all layers, weight units.
    """
    parts = [part for part in patch.steering if part.edit == request.id]
    columns = [own for part in patch.low_rank if (own := part.only(request.id)) is not None]
    told = next((part for part in patch.context if part.edit == request.id), None)
    every = (*parts, *columns, *((told,) if told else ()))
    size = sum(t.numel() * t.element_size() for part in every for t in part.tensors().values())
    return {
        "id": request.id,
        "subject": request.subject,
        "relation": request.relation,
        "prompt": request.text,
        "target_true": request.target_true,
        "target_new": request.target_new,
        "kinds": sorted({part.kind for part in every}),
        "steps": parts[0].steps if parts else None,
        "rank": [m.rank for m in parts[0].maps] if parts else [part.rank for part in columns],
        "bytes": size,
        "converged": patch.report.get(request.id, {}).get("converged"),
        "radius": parts[0].radius if parts else told.radius if told else None,
        "context": told.text if told else None,
        "n_implications": max(0, len(parts) - 1),
        "layers": [part.layer for part in columns],
        "sites": sorted({part.site for part in columns}),
        "norm": sum(part.norm**2 for part in columns) ** 0.5 if columns else None,
        "report": patch.report.get(request.id, {}),
    }


def _print_edits(edits: Sequence[dict[str, Any]], *, steering: bool, weights: bool) -> None:
    """The table of `show`, with the columns that this patch's kinds of edits have."""
    scope = ("radius", "follows") if steering or not weights else ()
    written = ("layers", "norm") if weights else ()
    steps = ("steps",) if scope else ()
    right = ("steps", "rank", "bytes", "radius", "follows", "norm")
    names = ("id", "subject", "prompt", "old -> new", *steps, "rank", "bytes", "converged", *scope, *written)
    made = table(None, *names, right=right)
    for e in edits:
        cells = {
            **e,
            "old -> new": f"{e['target_true']} -> {e['target_new']}",
            "rank": ", ".join(map(str, e["rank"])),
            "bytes": f"{e['bytes']:,}",
            "converged": {True: "yes", False: "NO", None: "-"}[e["converged"]],
            "radius": None if e["radius"] is None else f"{e['radius']:.3g}",
            "follows": e["n_implications"] or "",
            "layers": ", ".join(map(str, e["layers"])),
            "norm": None if e["norm"] is None else f"{e['norm']:.3g}",
        }
        row(made, *(cells[name] for name in names))
    out().print(made)


def methods(
    method: Annotated[str | None, typer.Argument(help="One method, with its presets and options.")] = None,
    json_output: Json = False,
) -> None:
    """List the editing methods and which models they edit, as the methods say it; of one, its presets and options."""
    from errata.editors import available_editors, get_editor

    known = available_editors()
    found = [_method(get_editor(name), known[name]) for name in ([method] if method else sorted(known))]
    if json_output:
        emit({"methods": found})
        return
    if method:
        [m] = found
        out().print(f"{m['method']}: {m['summary']}", markup=False, soft_wrap=True)
        made = table("options (--set NAME=VALUE)", "option", "default")
        for option, value in m["options"].items():
            row(made, option, value)
        out().print(made)
        made = table("presets (--preset NAME)", "preset", "what it changes")
        for preset, changes in m["presets"].items():
            row(made, preset, ", ".join(f"{option}={value}" for option, value in changes.items()))
        out().print(made)
        return
    made = table(None, "method", "place", "how", "streams", "learns", "keeps out", *ROLES.values())
    for m in found:
        traits = ("yes" if m[name] else "-" for name in ("streams", "learns", "scoped"))
        roles = ("yes" if role in m["supports"] else "-" for role in ROLES)
        row(made, m["method"], m["place"], m["how"], *traits, *roles)
    out().print(made)
    out().print(
        "streams: goes on from an earlier patch; learns: is trained before it edits (errata train); keeps out: prompts outside every "
        "edit's scope are answered bit for bit as before; the last three: models that it edits (encoders with a classification head). "
        "errata methods NAME tells more.",
        markup=False,
        style="dim",
    )


ROLES = {"decoder": "decoder", "encoder-decoder": "encoder-decoder", "classifier": "encoder"}


def _method(editor: Any, module: str) -> dict[str, Any]:
    """All that is said about a method."""
    options = {f.name: None if f.default is MISSING else f.default for f in fields(editor.Config)}
    presets = {preset: dict(changes) for preset, changes in sorted(editor.presets.items())}
    return editor.traits() | {"module": module, "presets": presets, "options": options}


def updates(
    out_path: Annotated[Path | None, typer.Option("--out", "-o", help="Write the file here.")] = None,
    json_output: Json = False,
) -> None:
    """Print where the shipped updates are (real changes since 1 January 2016, as edit requests), or write them to a file."""
    from errata.atlas.world import DATA, read_json
    from errata.files import write_atomically

    source = DATA / "updates.jsonl"
    data = source.read_bytes()
    if out_path:
        write_atomically(out_path, data)
    path = str(out_path or source)
    about = read_json("updates.about.json")
    if json_output:
        emit({"path": path, "n": len(data.splitlines()), "as_of": about.get("as_of"), "about": about})
        return
    typer.echo(path)
