"""The interface of every editing method: a frozen config and one `fit` that returns a patch and leaves the model alone."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch

from errata.edit import EditRequest
from errata.errors import ConfigError, RequestError, UnsupportedModelError
from errata.model.anatomy import Role, anatomy, reads_first
from errata.model.attached import without_patches
from errata.model.labels import label_id
from errata.model.room import check_room
from errata.model.states import evaluating
from errata.model.tokens import continuation_ids, subject_tokens, token_ids, wrapper
from errata.patch import Patch

C = TypeVar("C")
Progress = Callable[[int, int], None]
ARCHITECTURES: dict[Role, str] = {
    "decoder": "decoders",
    "encoder-decoder": "encoder-decoders",
    "classifier": "encoders with a classification head",
    "encoder": "encoders without a head",
}


class Editor(ABC, Generic[C]):
    """A method. `Method()` has our defaults (the paper's, where its file does not say otherwise).

    `Method(field=value)` changes some, `Method(config)` takes a config.

    method: its name, equal to its file's; summary: one line for `errata methods`; needs_subject: whether a request without
    a subject is refused; presets: named configurations. joint: whether one write serves all requests, so that a patch of some
    is not a part of the patch of all; batch: requests that a fit is quick with at once, where they do not bear on each other.
    place: where it edits ("external memory", "global optimisation", "local modification"); how: whether what it writes is
    "optimised" or "direct". supports: the roles (`model.anatomy`) of the models that it edits. streams: whether it takes requests
    one after another, each on what the earlier ones left, and goes on from a patch (`fit(..., onto=)`); learns: whether it is
    trained before it can fit; scoped: whether it promises that a prompt outside every edit's scope is answered bit for bit as if
    nothing were attached.
    """

    method: ClassVar[str]
    summary: ClassVar[str] = ""
    needs_subject: ClassVar[bool] = False
    joint: bool = False
    batch: int = 1
    place: ClassVar[str] = ""
    how: ClassVar[str] = ""
    supports: ClassVar[tuple[Role, ...]] = ("decoder",)
    streams: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    scoped: ClassVar[bool] = False
    Config: ClassVar[type[Any]]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, config: C | None = None, **changes: Any):
        base: Any = config if config is not None else self.Config()
        names = [f.name for f in fields(base)]
        for name in changes:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise ConfigError(
                    f"{self.method} has no option {name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}")
                )
        self.config: C = replace(base, **changes)

    def recorded(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The configuration that a patch fitted on this model says it was made with."""
        return asdict(cast(Any, self.config))

    def reads(self, model: Any) -> dict[str, Any]:
        """What a fit on this model reads besides its configuration, as JSON values that name it: what a cache must know."""
        return {}

    @classmethod
    def preset(cls, name: str, /, **changes: Any) -> Self:
        """The editor with a named configuration. Raises ConfigError listing the presets."""
        if name not in cls.presets:
            raise ConfigError(
                f"{cls.method} has no preset {name!r}; there are {', '.join(sorted(cls.presets)) or 'none'}"
            )
        return cls(**(cls.presets[name] | changes))

    @classmethod
    def traits(cls) -> dict[str, Any]:
        """What the method says about itself, as JSON values: the row of `errata methods` and of docs/taxonomy.md."""
        names = ("method", "summary", "place", "how", "streams", "learns", "scoped", "needs_subject")
        return {name: getattr(cls, name) for name in names} | {"supports": list(cls.supports)}

    @classmethod
    def wrote_jointly(cls, config: Mapping[str, Any]) -> bool:
        """Whether a patch of this method with this configuration holds one write for all its requests."""
        return cls.joint

    @abstractmethod
    def fit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[EditRequest],
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Patch:
        """The patch that realises the requests. The model's weights, flags and the random state are left as found."""

    def check(self, requests: Sequence[EditRequest], model: Any = None, tokenizer: Any = None) -> None:
        """Refuse what this method cannot fit; with a model and its tokenizer, also what these cannot take.

        Raises RequestError naming the request, SubjectNotFoundError if the tokenizer cannot place its subject,
        UnsupportedModelError for a model of another architecture than those that the method supports.
        """
        if model is not None:
            self.check_model(model)
        if not requests:
            raise RequestError("expected at least one edit request, found none")
        seen: dict[str, int] = {}
        for number, request in enumerate(requests, 1):
            if self.needs_subject and request.subject is None:
                raise RequestError(
                    f"{self.method} needs a subject, and request {number} ({request.prompt!r}) has none; give its subject"
                )
            if request.id in seen:
                raise RequestError(f"requests {seen[request.id]} and {number} are the same; remove one")
            seen[request.id] = number
        if tokenizer is not None:
            for request in requests:
                self._check_texts(request, model, tokenizer)

    @classmethod
    def check_model(cls, model: Any) -> None:
        """Refuse a model of an architecture that the method does not support, naming those that it does.

        A classification head on a decoder, which reads the text's last token and not its first, is none that any supports.
        """
        parts = anatomy(model)
        alien = parts.role == "classifier" and not reads_first(model)
        if alien or parts.role not in cls.supports:
            kind = "decoders with a classification head" if alien else ARCHITECTURES[parts.role]
            raise UnsupportedModelError(
                f"{cls.method} edits {' and '.join(ARCHITECTURES[role] for role in cls.supports)}, found {type(model).__name__} "
                f"({parts.family}), one of the {kind}; `errata methods` lists what edits which"
            )

    def _check_texts(self, request: EditRequest, model: Any, tokenizer: Any) -> None:
        """Refuse a subject that has no tokens in its prompt, and prompts that leave no room for the new object."""
        wrap = wrapper(tokenizer, bool(getattr(self.config, "chat", False)))
        if request.subject is not None and (tokenizer.is_fast or self.needs_subject):  # a slow tokenizer cannot tell
            subject_tokens(tokenizer, wrap(request.text), request.subject)
        prompts = [request.text, *request.fit_prompts, *(i.prompt for i in request.fit_implications)]
        if model is None:
            return
        role, new = anatomy(model).role, 0
        if role == "classifier":
            label_id(model, request.target_new)
        elif role == "decoder":
            new = len(continuation_ids(tokenizer, wrap(request.text), request.target_new))
        check_room(model, token_ids(tokenizer, [wrap(p) for p in prompts]), prompts, new=new)


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, no attached patch; the model is as it was afterwards."""
    with evaluating(model), without_patches(model), torch.no_grad():
        yield
