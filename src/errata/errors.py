"""Every exception of the package: one base, and each also is the built-in that fits.

A message says what was expected, what was found, where, and what to do.
"""


class EditError(Exception):
    """Base of all errors that errata raises on purpose."""

    def __str__(self) -> str:  # KeyError would show the repr of its message
        return str(self.args[0]) if self.args else ""


class RequestError(EditError, ValueError):
    """An edit request that cannot be meant: empty target, two `{}`, target equal to the old object."""


class SubjectNotFoundError(EditError, ValueError):
    """The subject does not occur in the prompt, or the tokenizer cannot place it."""


class ConfigError(EditError, ValueError):
    """A configuration value out of range, or a name that the configuration does not have."""


class ShapeError(EditError, ValueError):
    """Tensors whose shapes do not fit together."""


class AnatomyError(EditError, LookupError):
    """A model whose parts could not be found."""


class UnknownModelError(EditError, LookupError):
    """A model name that is neither bundled, nor a directory, nor reachable."""


class UnsupportedModelError(EditError, NotImplementedError):
    """A model of an architecture that a method does not edit."""


class UnknownEditorError(EditError, KeyError):
    """A method name that no file and no entry point provides."""


class BaseMismatchError(EditError, ValueError):
    """A patch fitted on another model or tokenizer."""


class StatisticsError(EditError, ValueError):
    """Key statistics that cannot serve: of another model or layer, of too few tokens, singular, or a damaged file."""


class UnsupportedPatchError(EditError, NotImplementedError):
    """A patch that cannot do what was asked: steering parts in weights or by row, an update of quantised weights."""


class UnstableWriteError(EditError, ArithmeticError):
    """A closed-form write that would blow up: keys nearly at right angles, or a matrix that cannot be factored."""


class PatchFormatError(EditError, ValueError):
    """A patch file that is truncated, altered or not a patch."""


class EndpointError(EditError, ConnectionError):
    """A language-model endpoint that is unreachable or answers nonsense."""


class RecordError(EditError, ValueError):
    """A record of a data set that does not fit its schema."""
