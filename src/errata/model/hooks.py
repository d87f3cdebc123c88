"""Capture and intervene by module path, never leaving a hook behind.

Modules return a bare tensor, a tuple or a ModelOutput, depending on the family and the version of transformers; the
helpers here always speak of the first tensor of the output.
"""

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from errata.errors import AnatomyError
from errata.model.anatomy import submodule

ForwardHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""(module, args, kwargs, output) -> new output, or None to leave it."""
PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
"""(module, args, kwargs) -> new (args, kwargs), or None to leave them."""
F = TypeVar("F")


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a module's output: itself, or the first in a tuple, list or mapping.

    Raises AnatomyError if there is none.
    """
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise AnatomyError(f"expected a tensor in the output of a module, found {type(output).__name__} without one.")


def with_first_tensor(output: Any, new: Tensor) -> Any:
    """A copy of `output`, of the same type, with its first tensor replaced by `new`; `output` itself stays.

    Raises AnatomyError if there is no tensor to replace.
    """
    old = first_tensor(output)
    if isinstance(output, Tensor):
        return new
    if isinstance(output, Mapping):
        key = next(k for k, v in output.items() if v is old)
        return type(output)(**{**output, key: new})
    at = next(i for i, v in enumerate(output) if v is old)
    values = [*output[:at], new, *output[at + 1 :]]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


class Hooks:
    """Context manager that registers hooks by module path ("" is the model) and removes exactly those.

    forward: path -> ForwardHook, pre: path -> PreHook; as mappings, or as pairs if a path occurs twice. On one module
    they run in the order given, after the hooks that were there before. They are removed on leaving, also after an
    exception or an interrupt, and if registering itself fails; other hooks are not touched.
    Raises AnatomyError on entering if a path does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Mapping[str, ForwardHook] | Iterable[tuple[str, ForwardHook]] = (),
        pre: Mapping[str, PreHook] | Iterable[tuple[str, PreHook]] = (),
    ) -> None:
        self._model = model
        self._forward = _pairs(forward)
        self._pre = _pairs(pre)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        assert not self._handles, "these hooks are already registered"
        try:
            for path, before in self._pre:
                module = submodule(self._model, path)
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            for path, after in self._forward:
                module = submodule(self._model, path)
                self._handles.append(module.register_forward_hook(after, with_kwargs=True))
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove these hooks; harmless if they are gone."""
        try:
            for handle in self._handles:
                handle.remove()
        except BaseException:  # interrupted half-way: removing twice is harmless, leaving one behind is not
            for handle in self._handles:
                handle.remove()
            raise
        finally:
            self._handles = []


class Capture:
    """Context manager that keeps the first tensor of each module's output (or input) at its latest call.

    `with Capture(model, paths) as seen: model(...)`, then `seen[path]`. Tensors are detached unless `detach=False`;
    they are not copied. of="input" keeps the first tensor among a module's arguments, e.g. the keys of an MLP.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Iterable[str],
        *,
        of: Literal["output", "input"] = "output",
        detach: bool = True,
    ) -> None:
        self._seen: dict[str, Tensor] = {}
        self._detach = detach
        names = list(dict.fromkeys(paths))
        hook = self._keep_output if of == "output" else self._keep_input
        self._hooks = Hooks(model, forward=[(path, hook(path)) for path in names])

    def _keep(self, path: str, tensor: Tensor) -> None:
        self._seen[path] = tensor.detach() if self._detach else tensor

    def _keep_output(self, path: str) -> ForwardHook:
        return lambda module, args, kwargs, output: self._keep(path, first_tensor(output))

    def _keep_input(self, path: str) -> ForwardHook:
        return lambda module, args, kwargs, output: self._keep(path, first_tensor((*args, *kwargs.values())))

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.remove()

    def __getitem__(self, path: str) -> Tensor:
        """The tensor kept for `path`. Raises AnatomyError if that module has not run."""
        if path not in self._seen:
            raise AnatomyError(
                f"expected a call of module {path!r} while capturing, found calls of {list(self._seen)}."
            )
        return self._seen[path]

    def __contains__(self, path: str) -> bool:
        return path in self._seen


def intervene(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Hooks:
    """Context manager in which the first tensor of each module's output is replaced: {path: fn(tensor)}.

    Shapes are the module's own: (n, T, d) for blocks and norms; OPT's fc1 and fc2 run on (n * T, d).
    """

    def replacing(change: Callable[[Tensor], Tensor]) -> ForwardHook:
        return lambda module, args, kwargs, output: with_first_tensor(output, change(first_tensor(output)))

    return Hooks(model, forward=[(path, replacing(change)) for path, change in changes.items()])


def _pairs(hooks: Mapping[str, F] | Iterable[tuple[str, F]]) -> list[tuple[str, F]]:
    return list(hooks.items()) if isinstance(hooks, Mapping) else list(hooks)
