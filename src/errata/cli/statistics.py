"""`errata statistics`: gather key statistics once; editors that need them find them in the cache."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli.common import (
    DeviceMap,
    Dtype,
    Json,
    Model,
    Threads,
    bar,
    emit,
    is_atlas,
    load,
    notice,
    out,
    row,
    table,
)
from errata.errors import ConfigError, StatisticsError

TEXTS = 100_000  # of a corpus other than Atlas's, as published


def statistics(
    model: Model,
    layers: Annotated[str, typer.Option("--layers", help="Such as 5, 3,4,5, 0-7 or all; counted from 0.")] = "all",
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            "--corpus",
            help="atlas (default for Atlas), a text file with one text a line (repeatable), or a data set of the hub as "
            "NAME, NAME:CONFIG or NAME:CONFIG:SPLIT.",
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Texts; 4,000 of Atlas's, 100,000 of others.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Cut each text to so many tokens.")] = 1024,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of a data set: a commit id names it for good.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Multiply in float32: errs by some 1e-7 of E|k_i k_j|.")] = False,
    cache: Annotated[Path | None, typer.Option("--cache", help="Another folder than the user's cache.")] = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Gather the uncentred second moment of the MLP keys, which ROME, MEMIT and their kin need, for some layers at once.

    What is there already is found and not gathered again. After Ctrl-C the same command goes on where it stopped.
    The cache is ERRATA_CACHE, else errata in XDG_CACHE_HOME or ~/.cache.
    """
    from errata.model.anatomy import anatomy
    from errata.model.statistics import key_statistics
    from errata.model.statistics_files import Store

    source = corpus_of(corpus, model, n, revision)
    count = n or TEXTS
    if source.revision is None or source.name == "atlas":
        texts = source.first(count)
        source, count = replace(source, read=lambda: texts), len(texts)
    loaded, tokenizer = load(model, dtype, device_map, threads)
    wanted = layers_of(layers, anatomy(loaded).n_layers)
    started = time.perf_counter()
    with bar("gathering key statistics", count) as progress:
        found = key_statistics(
            loaded,
            tokenizer,
            source,
            wanted,
            n_texts=None if source.name == "atlas" else n or TEXTS,
            max_tokens_per_text=max_tokens,
            product="float32" if fast else "float64",
            cache=cache,
            progress=lambda done, _: progress(done),
        )
    seconds = round(time.perf_counter() - started, 1)
    rows = []
    for layer, one in found.items():
        try:
            one.solver()
            problem = None
        except StatisticsError as error:
            problem = str(error)
            notice(f"layer {layer} cannot be solved with: {problem}")
        kept = Store(cache).path(one.identity)
        rows.append({"layer": one.layer, "tokens": one.count, "width": one.width, "problem": problem, "path": kept})
    if json_output:
        about = {name: one.identity[name] for name in ("corpus", "dtype", "max_tokens_per_text", "product")}
        emit({"model": model, **about, "n_texts": count, "seconds": seconds, "layers": rows})
        return
    made = table(None, "layer", "tokens", "width", "file", right=("layer", "tokens", "width"))
    for r in rows:
        row(made, r["layer"], f"{r['tokens']:,}", f"{r['width']:,}", r["path"])
    out().print(made)
    out().print(f"{len(rows)} layers in {seconds:.1f} s", markup=False)


def corpus_of(corpus: list[str] | None, model: str, n: int | None = None, revision: str | None = None) -> Any:
    """The texts that --corpus names. Raises ConfigError."""
    from errata.model.corpora import named_texts

    named = corpus or (["atlas"] if is_atlas(model) else [])
    if not named:
        raise ConfigError(f"expected --corpus for {model!r}: text files, a data set of the hub, or atlas; found none")
    if named == ["atlas"]:
        from errata.atlas.texts import STATISTICS_TEXTS, atlas_texts

        return atlas_texts(n or STATISTICS_TEXTS)
    return named_texts(named, revision)


def layers_of(text: str, n_layers: int) -> list[int]:
    """Layers from "all", "5", "3,4,5" or "0-7". Raises ConfigError; whether a layer exists is the model's to say."""
    if text.strip() == "all":
        return list(range(n_layers))
    found: list[int] = []
    for part in text.split(","):
        if span := re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part):
            found += range(int(span[1]), int(span[2]) + 1)
        elif one := re.fullmatch(r"\s*(-?\d+)\s*", part):
            found.append(int(one[1]))
        else:
            raise ConfigError(f"expected layers such as 5, 3,4,5, 0-7 or all, found {text!r}")
    if not found:
        raise ConfigError(f"expected layers in ascending order such as 0-7, found {text!r}")
    return list(dict.fromkeys(found))
