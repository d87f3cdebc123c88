"""One truncated pass over texts for the keys of several layers: group by group, kept as it goes, resumable."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from errata.errors import AnatomyError, RequestError
from errata.maths.covariance import SecondMoment
from errata.model.hooks import Hooks, PreHook, first_tensor
from errata.model.states import evaluating, input_device
from errata.model.statistics_files import Gathered, Store
from errata.model.tokens import Batch, pad, pad_id, token_ids

Progress = Callable[[int, int], None]
GROUP = 256  # texts that are sorted by length together; a run is kept and resumed between groups
_KEEP_SECONDS = 10.0  # between two writings of what an interrupted run goes on from


class _Stop(Exception):
    """All keys asked for have been seen."""


@dataclass(frozen=True)
class Pass:
    """One pass over texts, group by group. Each layer knows how many groups its sum holds and joins in after those."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    cap: int
    n_tokens: int | None
    batch_tokens: int

    def run(
        self, texts: Sequence[str], identities: dict[int, dict[str, Any]], store: Store, progress: Progress | None
    ) -> dict[int, Gathered]:
        """The finished sums by layer, on the CPU and in the store; on the way there, partial ones."""
        with torch.no_grad(), evaluating(self.model), weights_alone(self.model):
            sums = {i: store.find(one, partial=True) for i, one in identities.items()}
            sums |= self._empty({i: one for i, one in identities.items() if sums[i] is None})
            begun = [one for one in sums.values() if one is not None]
            self._gather(texts, begun, store, progress or (lambda done, total: None))
        for one in begun:
            one.moment, one.finished = one.moment.to("cpu"), True
        store.keep(begun)
        return {int(one.identity["layer"]): one for one in begun}

    def _gather(self, texts: Sequence[str], sums: Sequence[Gathered], store: Store, progress: Progress) -> None:
        first = min(sums, key=lambda one: one.groups)
        seen, last, cost = first.moment.count, time.perf_counter(), 0.0
        progress(min(first.groups * GROUP, len(texts)), len(texts))
        for group in range(first.groups, -(-len(texts) // GROUP)):
            if self.n_tokens is not None and seen >= self.n_tokens:
                break
            active = [one for one in sums if one.groups == group]
            rows = self._rows(texts[group * GROUP : (group + 1) * GROUP], seen)
            self._add(rows, {str(one.identity["site"]): one.moment for one in active})
            seen += sum(map(len, rows))
            for one in active:
                one.groups += 1
            now = time.perf_counter()
            if now - last >= max(_KEEP_SECONDS, 10 * cost):  # writing never takes a tenth of the time
                store.keep(active)
                last = time.perf_counter()
                cost = last - now
            progress(min((group + 1) * GROUP, len(texts)), len(texts))

    def _empty(self, identities: dict[int, dict[str, Any]]) -> dict[int, Gathered]:
        """A sum of nothing for each layer; one token through the model tells how wide its keys are."""
        widths: dict[str, int] = {}
        if identities:
            batch = pad([[0]], 0, input_device(self.model))
            sites = [str(one["site"]) for one in identities.values()]
            visit_keys(self.model, batch, sites, lambda site, keys: widths.update({site: keys.shape[1]}))
        return {
            i: Gathered(one, SecondMoment(widths[str(one["site"])], product=str(one["product"])))
            for i, one in identities.items()
        }

    def _rows(self, texts: Sequence[str], seen: int) -> list[list[int]]:
        """Token ids, cut to the cap; no further than the text that reaches n_tokens."""
        rows = [row[: self.cap] for row in self._ids(texts)]
        if self.n_tokens is None:
            return rows
        for i, row in enumerate(rows):
            seen += len(row)
            if seen >= self.n_tokens:
                return rows[: i + 1]
        return rows

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return token_ids(self.tokenizer, texts)
        except RequestError:  # a text of nothing but characters that the tokenizer drops is left out
            half = len(texts) // 2
            return [*self._ids(texts[:half]), *self._ids(texts[half:])] if half else []

    def _add(self, rows: Sequence[list[int]], moments: dict[str, SecondMoment]) -> None:
        """The keys of all rows, longest first, in batches of at most `batch_tokens` padded tokens."""
        order = sorted(rows, key=len, reverse=True)
        while order:
            size = max(1, self.batch_tokens // len(order[0]))
            batch = pad(order[:size], pad_id(self.tokenizer), input_device(self.model))
            visit_keys(self.model, batch, list(moments), lambda site, keys: moments[site].update(keys))
            order = order[size:]


def visit_keys(
    model: PreTrainedModel, batch: Batch, sites: Sequence[str], visit: Callable[[str, Tensor], None]
) -> None:
    """Call `visit(site, keys)` for each site (a module's path), in the order in which the forward pass meets them.

    keys (n, m): what the site is given for the batch's n real tokens, row by row, in the model's dtype. The pass ends
    there with the last site. Raises AnatomyError if a site is not called.
    """
    waiting = set(sites)

    def visiting(site: str) -> PreHook:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keys = first_tensor((*args, *kwargs.values()))
            real = batch.mask.to(keys.device).reshape(-1).bool()
            visit(site, keys.reshape(-1, keys.shape[-1])[real])  # OPT's are (rows * T, m) already
            waiting.discard(site)
            if not waiting:
                raise _Stop

        return hook

    with Hooks(model, pre=[(site, visiting(site)) for site in sites]), suppress(_Stop):
        model(**batch.inputs(model), use_cache=False)
    if waiting:
        raise AnatomyError(
            f"expected a call of each of {', '.join(sites)}, found none of {', '.join(sorted(waiting))}."
        )


@contextmanager
def weights_alone(model: nn.Module) -> Iterator[None]:
    """Inside, this package's own hooks on the model do nothing: what is cached by weights must come from them alone."""
    package = f"{__name__.partition('.')[0]}."
    tables = [t for module in model.modules() for t in (module._forward_pre_hooks, module._forward_hooks)]
    before = [(table, dict(table)) for table in tables if table]
    try:
        for table, hooks in before:
            for number, hook in hooks.items():
                if str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith(package):
                    del table[number]
        yield
    finally:
        for table, hooks in before:
            table.clear()
            table.update(hooks)
