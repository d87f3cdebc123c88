"""`errata demo`: a model that is out of date, corrected, checked, revised, and put back."""

import random
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.text import Text

from errata.cli.common import CHECK_FAILED, Json, Threads, bar, emit, err, load, out, percent, row, table
from errata.edit import EditRequest

SHOWN = 12  # rows of the first table
BLOCKS = 5  # edits of the second table, of three or four rows each
UNRELATED = 100
REVISED = ("headquarters", "stadium", "capital")  # what the demo makes up another value for: places, not people


def demo(
    model: Annotated[
        str, typer.Option("--model", "-m", help="atlas, atlas-llama, or a directory with another training of them.")
    ] = "atlas",
    n: Annotated[int, typer.Option("--n", min=2, help="How many of the shipped updates.")] = 40,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Atlas knows the world of 1 January 2016: correct it with SAKE, check, revise, take back, detach."""
    from errata.atlas.requests import update_requests
    from errata.atlas.world import load_world

    started = time.perf_counter()
    world = load_world()
    updates = update_requests(world)
    requests = [updates[i] for i in spread(updates, n)]
    show = _Story(model, silent=json_output)
    loaded, tokenizer = load(model, None, None, threads)
    demonstration = _Demonstration(loaded, tokenizer, world, requests, show)
    value = {"model": model, **demonstration.run(), "seconds": round(time.perf_counter() - started, 1)}
    if json_output:
        emit(value)
    else:
        show.say(f"{value['seconds']:.0f} seconds. Next: errata ask, errata fit, errata verify; errata --help.")
    if not value["restored"]:
        raise typer.Exit(CHECK_FAILED)


def spread(requests: Sequence[EditRequest], n: int) -> list[int]:
    """Places of `n` requests in file order, taken in turn from the relations, those that something follows from first."""
    pools: dict[str, list[int]] = {}
    for i in sorted(range(len(requests)), key=lambda i: not requests[i].fit_implications):
        pools.setdefault(requests[i].relation or "", []).append(i)
    picked: list[int] = []
    while len(picked) < n and any(pools.values()):
        picked += [pool.pop(0) for pool in pools.values() if pool]
    return sorted(picked[:n])


class _Story:
    """What the reader sees; nothing with --json."""

    def __init__(self, model: str, silent: bool):
        self.model, self.silent = model, silent

    def say(self, text: str) -> None:
        if not self.silent:
            out().print(f"\n{text}", markup=False)

    def print(self, made: Any) -> None:
        if not self.silent:
            out().print(made)


class _Demonstration:
    """The demo's steps; each asks the model itself, nothing is taken from memory."""

    def __init__(self, model: Any, tokenizer: Any, world: Any, requests: list[EditRequest], story: _Story):
        self.model, self.tokenizer, self.world, self.requests, self.story = model, tokenizer, world, requests, story

    def run(self) -> dict[str, Any]:
        """The JSON object without model and seconds."""
        from errata.atlas.probes import with_probes
        from errata.editors.sake import SAKE

        prompts = [request.text for request in self.requests]
        bits = self._logits(prompts)
        before = self._answers(prompts)
        self._outdated(before)
        editor = SAKE()
        with bar("fitting with SAKE", len(self.requests)) as progress:
            patch = editor.fit(self.model, self.tokenizer, self.requests, progress=lambda done, _: progress(done))
        judged = with_probes(self.world, list(patch.requests))
        with patch.attach(self.model, self.tokenizer):
            after = self._answers(prompts)
        self._corrected(patch, judged, before, after)
        checks = self._verified(patch, judged)
        self._revised(editor, patch, judged)
        restored = checks["restored"] and self._logits(prompts) == bits
        self.story.say(
            "Detached: the logits on all prompts are bit for bit what they were."
            if restored
            else "Detached, but the logits are NOT what they were."
        )
        columns = zip(self.requests, before, after, strict=True)
        return {
            "edits": [
                {"subject": r.subject, "prompt": r.text, "target_new": r.target_new, "before": old, "after": new}
                for r, old, new in columns
            ],
            "summary": {
                "n_edits": len(patch),
                **{name: checks[name]["value"] for name in ("efficacy", "generalization", "specificity")},
            },
            "restored": bool(restored),
        }

    # -- the steps ---------------------------------------------------------------------------------------------------

    def _outdated(self, before: list[str]) -> None:
        self.story.say(f"1. {self.story.model} was trained on the world of 1 January 2016. Its answers, and today's:")
        made = table(None, "prompt", "the model says", "today", "since")
        for i in spread(self.requests, SHOWN):
            request = self.requests[i]
            row(made, request.text, before[i], request.target_new, request.since)
        self.story.print(made)
        self.story.say(f"2. SAKE fits {len(self.requests)} corrections; no weight changes.")

    def _corrected(self, patch: Any, judged: list[EditRequest], before: list[str], after: list[str]) -> None:
        """Per edit: its prompt, one paraphrase, one consequence, one neighbour; all of them before and after."""
        from errata.model.generate import says

        order = sorted(spread(judged, BLOCKS), key=lambda i: not judged[i].fit_implications)
        lines = [line for i in order for line in self._lines(judged[i])]
        olds = self._answers([prompt for _, prompt, _ in lines])
        with patch.attach(self.model, self.tokenizer):
            news = self._answers([prompt for _, prompt, _ in lines])
        made = table(None, "", "prompt", "before", "after", "")
        kinds = [kind for kind, *_ in lines]
        for i, ((kind, prompt, expected), old, new) in enumerate(zip(lines, olds, news, strict=True)):
            good = new == old if expected is None else says(new, expected)
            mark = Text("kept" if new == old else "new", "green") if good else Text("wrong", "red")
            row(made, kind, prompt, old, new, mark, end_section=kinds[i + 1 : i + 2] == ["edit"])
        self.story.say("3. The corrected model, asked in words that the fit has not seen:")
        self.story.print(made)
        right = sum(says(a, r.target_new) for a, r in zip(after, self.requests, strict=True))
        self.story.say(f"{right} of {len(after)} prompts get today's answer (errata demo --json lists them all).")

    def _lines(self, request: EditRequest) -> list[tuple[str, str, str | None]]:
        """(what, prompt, expected answer or None for the unedited one)."""
        from errata.atlas.probes import consequence_prompts, fact_of

        lines: list[tuple[str, str, str | None]] = [("edit", request.text, request.target_new)]
        lines += [("paraphrase", prompt, request.target_new) for prompt in request.paraphrase_prompts[:1]]
        fact = fact_of(self.world, request)
        if fact is not None and request.fit_implications:
            stale = {second.object for second in self.world.consequences(fact)}
            follows = consequence_prompts(self.world, fact, request.target_new)
            follows.sort(key=lambda pair: pair[1] in stale)  # rather one that changes
            lines += [("consequence", prompt, answer) for prompt, answer in follows[:1]]
        return lines + [("neighbour", prompt, None) for prompt in request.neighborhood_prompts[:1]]

    def _verified(self, patch: Any, judged: list[EditRequest]) -> dict[str, Any]:
        from errata.atlas.probes import unrelated_texts
        from errata.bench.verify import verify

        texts = unrelated_texts(self.world, UNRELATED, 0)
        with err().status("verifying") as status:
            checks = verify(
                self.model, self.tokenizer, patch, texts, requests=judged, progress=lambda t: status.update(t)
            )
        self.story.say("4. Verified on all probes, all edits loaded at once:")
        made = table(None, "", "value", "n", "how", right=("value", "n"))
        for name in ("efficacy", "generalization", "specificity", "locality"):
            figure = checks[name]
            row(made, name, percent(figure["value"]), figure["n"], figure["protocol"] or figure["reason"])
        self.story.print(made)
        return checks

    def _revised(self, editor: Any, patch: Any, judged: list[EditRequest]) -> None:
        """Replace one edit and remove another; the patch is a value, so both are new patches."""
        first = next((i for i, r in enumerate(judged) if r.relation in REVISED), 0)
        second = next(i for i in range(len(judged)) if i != first)
        old, gone = patch.requests[first], patch.requests[second]
        new = self._another(old)
        with err().status("fitting one more"):
            revised = patch.revise(old.id, editor.fit(self.model, self.tokenizer, [new])).without(gone.id)
        made = table(None, "prompt", "corrected", "", "afterwards")
        with patch.attach(self.model, self.tokenizer):
            corrected = self._answers([old.text, gone.text])
        with revised.attach(self.model, self.tokenizer):
            afterwards = self._answers([old.text, gone.text])
        row(made, old.text, corrected[0], f"revised to {new.target_new}", afterwards[0])
        row(made, gone.text, corrected[1], "taken back", afterwards[1])
        self.story.say("5. One correction is revised (to a made-up value), another is taken back:")
        self.story.print(made)

    def _another(self, request: EditRequest) -> EditRequest:
        """The request with another object of its relation."""
        taken = {(request.target_true or "").casefold(), request.target_new.casefold()}
        objects = self.world.objects.get(request.relation, ["Elsewhere", "Nowhere"])
        other = random.Random(0).choice([o for o in objects if o.casefold() not in taken])
        changed = {"target_new": other, "fit_implications": (), "since": None, "source": None}
        return request.model_copy(update=changed)

    # -- asking ------------------------------------------------------------------------------------------------------

    def _answers(self, prompts: list[str]) -> list[str]:
        from errata.model.generate import greedy_answers

        return greedy_answers(self.model, self.tokenizer, prompts)

    def _logits(self, prompts: list[str]) -> list[bytes]:
        """The bytes of the logits of each prompt."""
        import torch

        found = []
        with torch.no_grad():
            for prompt in prompts:
                ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(self.model.device)
                logits = self.model(input_ids=ids, use_cache=False).logits.cpu().contiguous()
                found.append(logits.view(torch.uint8).numpy().tobytes())
        return found
