"""Single weight edits on Atlas, each alone on the model: figures, and the speed of the batched fit.

    python benchmarks/rome.py [--method rome] [--preset atlas] [--n 200] [--split dev] [--seed 0] [--set lr=1.0] [--out FILE]
    python benchmarks/rome.py --speed [--n 100] [--one 20] [--threads 2] [--batch 256] [--set lr=1.0] [--out FILE]

Judged by whole objects under greedy decoding: the edit's prompt, `probe` phrasings, the same relation of other subjects, the
subject's other relations. `--speed` fits the same edits in one batch, and one at a time without reuse, on the same 21 contexts with
at most 20 steps, each in a process of its own, whose peak resident memory is reported beside what it was before the fit.
"""

import argparse
import ast
import json
import os
import platform
import random
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console

import errata
import errata.files
from errata.atlas.probes import fact_of, paraphrases
from errata.atlas.requests import counterfactual_requests
from errata.atlas.world import Fact, World, link, load_world
from errata.bench.ask import Question
from errata.bench.cases import Kind, Probe
from errata.bench.singles import alone, judge_singles
from errata.bench.verify import environment
from errata.editors import get_editor
from errata.editors._weights import context_types, layer_index, statistics_of

OTHERS = 3  # facts asked about per edit, of other subjects and of the same one


def questions_of(world: World, requests: list[errata.EditRequest], seed: int) -> list[Question]:
    """What single edits are asked, in `probe` phrasings; the facts beside them are of the edit's own split."""
    rng = random.Random(seed)
    asked: dict[tuple[str, Kind, str], Question] = {}

    def add(request: errata.EditRequest, kind: Kind, prompt: str, *expected: str) -> None:
        probe = Probe(kind, prompt, expected)
        asked.setdefault((request.id, kind, prompt), Question(request.id, request.id, len(asked), probe))

    for request in requests:
        fact = fact_of(world, request)
        if fact is None:
            raise SystemExit(f"expected edits of Atlas's facts, found {request.text!r}")
        add(request, "edit", request.text, request.target_new)
        for prompt in paraphrases(world, fact, rng):
            add(request, "paraphrase", prompt, request.target_new)
        same = [f for f in world.by_relation[fact.relation] if f.split == fact.split and f.subject != fact.subject]
        own = [f for f in world.by_subject[link(fact.subject)] if f.relation != fact.relation]
        beside: dict[Kind, list[Fact]] = {"neighborhood": same, "other_relation": own}
        for kind, facts in beside.items():
            for other in rng.sample(facts, min(len(facts), OTHERS)):
                add(request, kind, rng.choice(paraphrases(world, other, rng, aliases=False)))
    return list(asked.values())


def editor_of(args: argparse.Namespace, options: dict[str, Any]) -> Any:
    """The method with the preset's settings, and with those of the command line."""
    Editor = get_editor(args.method)
    return Editor.preset(args.preset, **options) if args.preset else Editor(**options)


def fitted(editor: Any, model: Any, tokenizer: Any, requests: list[errata.EditRequest], seed: int) -> list[Any]:
    """A patch per edit: parted from one fit where the method's edits are independent, else fitted one by one."""
    if not getattr(editor, "joint", False):
        return alone(editor.fit(model, tokenizer, requests, seed=seed))
    return [editor.fit(model, tokenizer, [request], seed=seed) for request in requests]


def figures(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Fit and judge with one method; `--mode one`: each edit by itself, without reuse, its probes one at a time."""
    torch.set_num_threads(args.threads)
    world = load_world()
    model, tokenizer = errata.load(args.model)
    model = model.float()
    requests = counterfactual_requests(world, args.n, split=args.split, seed=args.seed)
    editor = editor_of(args, options)
    if args.mode:  # contexts and statistics made once, for both ways alike
        layer = layer_index(model, editor.config.layer)
        statistics = statistics_of(editor.config, model, tokenizer, [layer])
        [contexts] = context_types(editor.config, model, tokenizer, args.seed, like="rome")
        same = {"contexts": contexts, "statistics": statistics, "reuse": args.mode != "one"}
        editor = editor_of(args, options | same)
    chosen = requests[: args.one] if args.mode == "one" else requests
    if args.mode:
        editor.fit(model, tokenizer, requests[:1], seed=args.seed)  # the first call is slower
    before, started, worked = peak(), time.perf_counter(), time.process_time()
    if args.mode == "one":
        patches = [patch for r in chosen for patch in fitted(editor, model, tokenizer, [r], args.seed)]
    else:
        patches = fitted(editor, model, tokenizer, chosen, args.seed)
    seconds, fitting, after = time.perf_counter() - started, time.process_time() - worked, peak()
    asked = questions_of(world, chosen, args.seed)
    started, worked = time.perf_counter(), time.process_time()
    rates = judge_singles(model, tokenizer, patches, asked, batch=1 if args.mode == "one" else args.batch)
    probing, asking = time.perf_counter() - started, time.process_time() - worked
    found: dict[str, Any] = {name: asdict(figure) for name, figure in rates.items()}
    if args.mode == "batched":  # the edits that the other way is timed on
        ids = {request.id for request in requests[: args.one]}
        some = judge_singles(
            model, tokenizer, [p for p in patches if p.ids[0] in ids], [q for q in asked if q.edit in ids]
        )
        found["same_edits"] = {name: asdict(figure) for name, figure in some.items()}
    steps = [entry["steps"] for p in patches for entry in p.report.values()]
    return found | {
        "n_edits": len(patches),
        "n_questions": len(asked),
        "seconds_fit_per_edit": round(seconds / len(patches), 4),
        "seconds_probes_per_edit": round(probing / len(patches), 4),
        "cpu_seconds_fit_per_edit": round(fitting / len(patches), 4),
        "cpu_seconds_probes_per_edit": round(asking / len(patches), 4),
        "steps_mean": sum(steps) / len(steps),
        "stopped_early": sum(e["stopped"] for p in patches for e in p.report.values()) / len(patches),
        "peak_mib": {"before_fit": before, "after_fit": after},
        "config": {k: v for k, v in patches[0].config.items() if k != "statistics"},
        "environment": environment(model),
    }


def peak() -> float:
    """Peak resident memory of this process so far, MiB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (2**20 if sys.platform == "darwin" else 2**10), 1)


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Both ways, one after the other, each in its own process."""
    found: dict[str, Any] = {}
    for mode in ("batched", "one"):
        command = [sys.executable, *sys.argv, "--mode", mode, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[mode] = json.loads(done.stdout)[args.method]
    each = [found[m]["seconds_fit_per_edit"] + found[m]["seconds_probes_per_edit"] for m in ("batched", "one")]
    fits = [found[m]["seconds_fit_per_edit"] for m in ("batched", "one")]
    return found | {"speedup_fit_and_probes": each[1] / each[0], "speedup_fit": fits[1] / fits[0]}


def machine(threads: int) -> dict[str, Any]:
    """The class of machine that the figures are of, and how busy it was."""
    return {
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "threads": threads,
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "command": " ".join(sys.argv),
    }


def options_of(pairs: list[str]) -> dict[str, Any]:
    """{"layer": 4} of ["layer=4"]; a value that is no Python literal is a string."""
    found: dict[str, Any] = {}
    for name, _, value in (pair.partition("=") for pair in pairs):
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--method", default="rome")
    parser.add_argument("--preset", default="atlas", help="'' for the method's defaults")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="settings of the method")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--one", type=int, default=20, help="edits that are fitted one at a time under --speed")
    parser.add_argument("--batch", type=int, default=64, help="probes that are asked at a time")
    parser.add_argument("--mode", choices=("batched", "one"), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.speed and args.method != "rome":
        parser.error("--speed is about ROME")
    state = machine(args.threads)
    found = speed(args) if args.speed and not args.mode else figures(args, options_of(args.set))
    text = json.dumps({args.method: found, "machine": state}, indent=1, ensure_ascii=False)
    if args.out and not args.mode:
        errata.files.write_atomically(args.out, text + "\n")
    if args.json:
        print(text)
    else:
        Console(stderr=True).print_json(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
