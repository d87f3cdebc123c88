"""Files are written whole or not at all; and where caches are."""

import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write to a temporary name in the same folder, then rename: readers see the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")  # tempfile's would be for its owner's eyes only
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporaries(folder: str | Path) -> Iterator[Path]:
    """What killed processes were writing with `write_atomically`, in a folder and those below it."""
    return (path for path in Path(folder).rglob(".*") if re.fullmatch(r"\..+\.[0-9a-f]{12}", path.name))


def cache_directory(kind: str) -> Path:
    """The user's cache of one kind: a folder of that name under ERRATA_CACHE, else under errata in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("ERRATA_CACHE"):
        return Path(own).expanduser() / kind
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))  # the XDG specification has relative ones ignored
    return (root if root.is_absolute() else Path.home() / ".cache") / "errata" / kind
