"""Settings of an editor on a stream of `dev` items, as `grace-zsre` and `grace-scotus` have it: what to choose a preset by.

    python benchmarks/streams.py ft --preset atlas-grace --set lr=3e-4 --set lr=1e-3 --n 200
    python benchmarks/streams.py grace --model atlas-docket --preset atlas-docket --set layer=1 --set layer=2

A name that is set more than once takes each of its values, with each of the others'. Prints one JSON object a setting: TRR, ERR,
their mean and other wordings at the stream's end, whole answers, bare shares with 95 % intervals (Wilson); seconds an edit.
Rates depend on how long the stream is: take as many items as the run that is to be reported.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

import errata
from errata.bench import streams
from errata.bench.ask import Question, ask
from errata.bench.cases import Case, Probe
from errata.bench.intervals import share
from errata.bench.preset import Context, get_preset
from errata.cli.fit import make_editor
from errata.model.anatomy import anatomy


def grid(settings: Sequence[str]) -> list[list[str]]:
    """NAME=VALUE settings as every choice of one value a name, names in the order of their first value."""
    values: dict[str, list[str]] = {}
    for setting in settings:
        values.setdefault(setting.partition("=")[0], []).append(setting)
    return [list(choice) for choice in itertools.product(*values.values())]


def trial(editor: Any, model: Any, tokenizer: Any, cases: Sequence[Case], world: Sequence[Probe]) -> dict[str, Any]:
    """The figures of one stream, asked at its end. The model is left as found."""
    requests = list({case.request.id: case.request for case in cases}.values())
    started = time.perf_counter()
    patch, errors = streams.follow(editor, model, tokenizer, requests, len(requests))
    seconds, made = time.perf_counter() - started, len(streams.edited(patch))
    held = set(streams.standing(patch)) if patch is not None else set()
    questions = [Question("", "", i, probe) for i, probe in enumerate(world)]
    questions += [
        Question(case.id, case.request.id, i, probe)
        for case in cases if case.request.id in held
        for i, probe in enumerate(case.probes)
    ]  # fmt: skip
    found: dict[str, list[bool]] = {"upstream": [], "edit": [], "paraphrase": []}
    with streams.put_in(patch, model, tokenizer) if patch is not None and patch.parts else nullcontext():
        for question, row in zip(questions, ask(model, tokenizer, questions, figures=False), strict=True):
            found[question.probe.kind].append(bool(row["passed"]))
    trr, err, others = (share(passed) if passed else None for passed in found.values())
    return {
        "edits": made, "failed": len(errors), "TRR": trr, "ERR": err,
        "avg": round((trr["value"] + err["value"]) / 2, 4) if trr and err else None, "other_wordings": others,
        "seconds_an_edit": round(seconds / max(1, made), 3),
    }  # fmt: skip


def main() -> None:
    """Follow a stream with every setting, and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--preset")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="NAME=VALUE")
    parser.add_argument("--n", type=int, default=50, help="items of the stream")
    parser.add_argument("--upstream", type=int, default=200, help="prompts of what the model was made for")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = errata.load(args.model)
    preset = get_preset("grace-scotus" if anatomy(model).role == "classifier" else "grace-zsre")
    context = Context(args.model, model, tokenizer, args.n, args.seed, "dev")
    cases = preset.cases(context)
    world = preset.world(context)[: args.upstream] if preset.world else []
    for settings in grid(args.settings):
        editor = make_editor(args.method, args.preset, settings)
        about = {
            "method": args.method,
            "preset": args.preset,
            "set": settings,
            "model": args.model,
            "items": len(cases),
        }
        print(json.dumps(about | trial(editor, model, tokenizer, cases, world)), flush=True)


if __name__ == "__main__":
    main()
