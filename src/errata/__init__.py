"""errata: correct facts inside language models, prove that the correction took, and take it back at any time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from errata.edit import EditRequest, Implication, read_requests, write_requests
    from errata.editors import available_editors, get_editor
    from errata.editors.actadd import ActAdd, ActAddConfig
    from errata.editors.compmemit import CompMEMIT, CompMEMITConfig
    from errata.editors.defer import Defer, DeferConfig
    from errata.editors.emmet import EMMET, EMMETConfig
    from errata.editors.ft import FT, FTConfig
    from errata.editors.ft_ewc import FTEWC, FTEWCConfig
    from errata.editors.ft_retrain import FTRetrain, FTRetrainConfig
    from errata.editors.grace import GRACE, GRACEConfig
    from errata.editors.icl import ICL, ICLConfig
    from errata.editors.memit import MEMIT, MEMITConfig
    from errata.editors.memory import Memory, MemoryConfig
    from errata.editors.rome import ROME, ROMEConfig
    from errata.editors.sake import SAKE, SAKEConfig
    from errata.editors.uniform import Uniform, UniformConfig
    from errata.model.loading import load
    from errata.patch import Patch, load_patch

_HOME = {
    "EditRequest": "errata.edit",
    "Implication": "errata.edit",
    "read_requests": "errata.edit",
    "write_requests": "errata.edit",
    "available_editors": "errata.editors",
    "get_editor": "errata.editors",
    "ActAdd": "errata.editors.actadd",
    "ActAddConfig": "errata.editors.actadd",
    "CompMEMIT": "errata.editors.compmemit",
    "CompMEMITConfig": "errata.editors.compmemit",
    "Defer": "errata.editors.defer",
    "DeferConfig": "errata.editors.defer",
    "EMMET": "errata.editors.emmet",
    "EMMETConfig": "errata.editors.emmet",
    "FT": "errata.editors.ft",
    "FTConfig": "errata.editors.ft",
    "FTEWC": "errata.editors.ft_ewc",
    "FTEWCConfig": "errata.editors.ft_ewc",
    "FTRetrain": "errata.editors.ft_retrain",
    "FTRetrainConfig": "errata.editors.ft_retrain",
    "GRACE": "errata.editors.grace",
    "GRACEConfig": "errata.editors.grace",
    "ICL": "errata.editors.icl",
    "ICLConfig": "errata.editors.icl",
    "MEMIT": "errata.editors.memit",
    "MEMITConfig": "errata.editors.memit",
    "Memory": "errata.editors.memory",
    "MemoryConfig": "errata.editors.memory",
    "ROME": "errata.editors.rome",
    "ROMEConfig": "errata.editors.rome",
    "SAKE": "errata.editors.sake",
    "SAKEConfig": "errata.editors.sake",
    "Uniform": "errata.editors.uniform",
    "UniformConfig": "errata.editors.uniform",
    "load": "errata.model.loading",
    "Patch": "errata.patch",
    "load_patch": "errata.patch",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    """Public names load on first use: `import errata` itself costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'errata' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
