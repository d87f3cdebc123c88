"""What is attached to a model, as the code that runs it needs to know: where its tables are, and how prompts are asked.

A model carries its tables itself, under these names; here nothing is known of edits.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn

ATTACHED, MERGED = "_errata_low_rank", "_errata_merged"
STEERED, CONTEXT = "_errata_steering", "_errata_context"
OUTPUTS, DENSE = "_errata_outputs", "_errata_dense"


class Suspendable:
    """A table that can be made to do nothing for a while."""

    _off = False
    _hooks: Any = ()  # handles on the model's parts, as they are or by path

    def idle(self) -> set[int]:
        """Ids of its hooks, while they do nothing."""
        hooks = self._hooks.values() if isinstance(self._hooks, dict) else self._hooks
        return {hook.id for hook in hooks} if self._off else set()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, the model runs as if nothing of this kind were attached."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before


def asked(model: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts as the model is to be asked them: with the texts that attached context patches put before them.

    Everything that asks a model by text goes through here. Where rows have patches of their own, prompts are one a row.
    """
    table = vars(model).get(CONTEXT)
    return list(prompts) if table is None else list(table.asked(prompts))


def bare(model: Any) -> bool:
    """Whether nothing is attached; what is merged into weights does not count."""
    return not any(name in vars(model) for name in (STEERED, ATTACHED, CONTEXT, OUTPUTS, DENSE))


def acts_in(model: Any, module: nn.Module) -> bool:
    """Whether the module or a part of it has hooks that do something: anybody's, but for those of suspended tables."""
    tables = [vars(model)[name] for name in (STEERED, ATTACHED, CONTEXT, OUTPUTS, DENSE) if name in vars(model)]
    idle = {hook for table in tables for hook in table.idle()}
    return any({*part._forward_hooks, *part._forward_pre_hooks} - idle for part in module.modules())


def by_row(model: Any) -> bool:
    """Whether each row of a batch has a patch of its own, so that rows must stay in their order."""
    table = vars(model).get(ATTACHED)
    return table is not None and bool(table.by_row)


def scoped(model: Any, name: str) -> Any:
    """The table of steering or contexts by its name, if it is there and some edit in it has a scope; else None."""
    table = vars(model).get(name)
    return table if table is not None and table.scoped else None


@contextmanager
def unmerged(model: Any) -> Iterator[None]:
    """Inside, the weights are those from before any merge."""
    merged = vars(model).get(MERGED)
    with merged.undone() if merged is not None else nullcontext():
        yield


@contextmanager
def without_patches(model: Any) -> Iterator[None]:
    """Inside, attached patches of every kind do nothing; what is merged into weights stays."""
    with ExitStack() as stack:
        for name in (STEERED, ATTACHED, CONTEXT, OUTPUTS, DENSE):
            if (table := vars(model).get(name)) is not None:
                stack.enter_context(table.suspended())
        yield
