"""Linear transport against POT: equality in float64, time at d = 4096 at equal threads, and stored size.

    python benchmarks/transport.py [--quick] [--threads N] [--pot-backend numpy|torch] [--json]

1. ||A - A_POT|| / ||A_POT|| (Frobenius, float64) at d = 256, 768, 1600, with the default relative reg and the paper's
   absolute one. Limit 1e-5.
2. Fit and inverse at d = 4096: ours against `ot.da.LinearTransport.fit` (which also inverts), in one process.
   Equal threads: `torch.set_num_threads(N)` for torch's pools and `threadpoolctl.threadpool_limits(N)` for every BLAS
   and OpenMP pool that NumPy and SciPy brought along. Default N: torch's default. POT runs once, ours `--repeats` times
   (median). `--pot-backend torch` gives POT the same BLAS as ours.
3. Numbers stored by the exact map and by a truncated one, beside d^2.

The samples are 200 source and 100 target states with decaying spectra in different directions, as hidden states have.
Exit code 0 if every limit holds (equality, 300 times faster, 10 times smaller), 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import ot
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from errata.maths.transport import LinearMap, gaussian_transport, spread

N_SOURCE, N_TARGET, REG = 200, 100, 1e-2
EQUAL_WIDTHS, TIMED_WIDTH = (256, 768, 1600), 4096
MAX_ERROR, MIN_SPEEDUP, MIN_SHRINK = 1e-5, 300.0, 10.0


def hidden_like(d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Source (200, d) and target (100, d): power-law spectra, partly shared directions, a large common mean."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mirrors = torch.nn.functional.normalize(normal(4, d), dim=1)
    common = 5 * normal(d)

    def states(n: int, decay: float, turns: Tensor, shift: Tensor) -> Tensor:
        x = 4 * torch.arange(1, d + 1, dtype=torch.float64) ** -decay * normal(n, d)
        for mirror in turns:  # reflections turn the axes at O(nd) cost
            x = x - 2 * (x @ mirror)[:, None] * mirror
        return x + common + shift

    return states(N_SOURCE, 0.8, mirrors[:3], normal(d)), states(N_TARGET, 0.6, mirrors[1:], normal(d))


def pot_fit(x_s: Tensor, x_t: Tensor, rho: float, backend: str) -> Tensor:
    """POT's A (d, d), from its NumPy or its torch backend."""
    source, target = (x_s, x_t) if backend == "torch" else (x_s.numpy(), x_t.numpy())
    fitted = ot.da.LinearTransport(reg=rho).fit(Xs=source, Xt=target)
    return torch.as_tensor(np.asarray(fitted.A_))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def difference(ours: LinearMap, A_pot: Tensor) -> float:
    """Relative Frobenius distance of our A from POT's; A_pot is overwritten."""
    scale = float(A_pot.norm())
    return float(A_pot.sub_(ours.dense()[0]).norm()) / scale


def equality(seed: int, backend: str) -> list[dict[str, Any]]:
    """One row for each width and kind of reg: relative error, rank, seconds of both."""
    rows = []
    for d in EQUAL_WIDTHS:
        x_s, x_t = hidden_like(d, seed)
        for relative in (True, False):
            rho = REG * spread(x_s) ** 2 if relative else REG
            ours_s, ours = timed(partial(gaussian_transport, x_s, x_t, reg=REG, relative=relative))
            pot_s, A_pot = timed(partial(pot_fit, x_s, x_t, rho, backend))
            error = difference(ours, A_pot)
            rows.append(
                {"d": d, "reg": "relative" if relative else "absolute", "rho": rho, "rank": ours.rank, "error": error}
                | {"seconds_ours": ours_s, "seconds_pot": pot_s, "ok": error <= MAX_ERROR}
            )
    return rows


def speed(seed: int, backend: str, repeats: int) -> dict[str, Any]:
    """Fit and inverse at d = 4096, ours and POT's, and how far the two maps are apart."""
    x_s, x_t = hidden_like(TIMED_WIDTH, seed)

    def fit() -> LinearMap:
        fitted = gaussian_transport(x_s, x_t, reg=REG)
        fitted.inverse()
        return fitted

    runs = [timed(fit) for _ in range(repeats + 1)][1:]  # the first call also wakes the thread pools
    seconds = [s for s, _ in runs]
    pot_s, A_pot = timed(partial(pot_fit, x_s, x_t, REG * spread(x_s) ** 2, backend))
    ratio, error = pot_s / statistics.median(seconds), difference(runs[0][1], A_pot)
    return {
        "d": TIMED_WIDTH,
        "seconds_ours": statistics.median(seconds),
        "seconds_ours_all": seconds,
        "seconds_pot": pot_s,
        "ratio": ratio,
        "error": error,
        "ok": ratio >= MIN_SPEEDUP and error <= MAX_ERROR,
    }


def sizes(seed: int) -> list[dict[str, Any]]:
    """Numbers stored by the exact map and by one truncated to 10 % error, beside the d^2 of a matrix."""
    rows: list[dict[str, Any]] = []
    for d in (*EQUAL_WIDTHS, TIMED_WIDTH):
        x_s, x_t = hidden_like(d, seed)
        exact = gaussian_transport(x_s, x_t, reg=REG)
        cut = exact.truncate(x_s, tolerance=0.1)
        for name, fitted in (("exact", exact), ("10 % off", cut)):
            numbers = fitted.nbytes // 8  # float64
            rows.append(
                {"d": d, "map": name, "rank": fitted.rank, "numbers": numbers, "d_squared": d * d}
                | {"ratio": d * d / numbers, "bytes_float16": fitted.to(torch.float16).nbytes}
            )
            if d == TIMED_WIDTH and fitted is exact:
                rows[-1]["ok"] = d * d / numbers >= MIN_SHRINK
    return rows


def machine(threads: int, backend: str) -> dict[str, Any]:
    """What the figures were taken on."""
    pools = [{k: p.get(k) for k in ("user_api", "internal_api", "version", "num_threads")} for p in threadpool_info()]
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": threads,
        "torch_threads": torch.get_num_threads(),
        "pools": pools,
        "pot_backend": backend,
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "pot": ot.__version__},
    }


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table of right-aligned cells."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    console, where = Console(), report["machine"]
    load = "unknown" if where["load_before"] is None else f"{where['load_before']:.1f}"
    console.print(
        f"{where['cores']} cores ({where['processor']}), {where['threads']} thread(s) for torch and every BLAS pool, "
        f"load {load} before, POT on {where['pot_backend']}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    )
    marks = {True: "yes", False: "NO"}
    console.print(
        table(
            f"Equality with POT, {N_SOURCE} + {N_TARGET} samples, float64 (limit {MAX_ERROR:g})",
            ("d", "reg", "rank", "|A-A_POT|/|A_POT|", "ours s", "POT s", "holds"),
            [
                (str(r["d"]), r["reg"], str(r["rank"]), f"{r['error']:.1e}", f"{r['seconds_ours']:.3f}")
                + (f"{r['seconds_pot']:.2f}", marks[r["ok"]])
                for r in report["equality"]
            ],
        )
    )
    if report["speed"]:
        r = report["speed"]
        console.print(
            table(
                f"Fit and inverse at d = {r['d']} (limit {MIN_SPEEDUP:g} times)",
                ("ours s", "POT s", "times faster", "|A-A_POT|/|A_POT|", "holds"),
                [
                    (f"{r['seconds_ours']:.3f}", f"{r['seconds_pot']:.1f}", f"{r['ratio']:.0f}", f"{r['error']:.1e}")
                    + (marks[r["ok"]],)
                ],
            )
        )
    console.print(
        table(
            f"Numbers stored (limit: exact map at d = {TIMED_WIDTH} at least {MIN_SHRINK:g} times smaller than d^2)",
            ("d", "map", "rank", "numbers", "d^2", "smaller", "fp16 bytes", "holds"),
            [
                (str(r["d"]), r["map"], str(r["rank"]), f"{r['numbers']:,}", f"{r['d_squared']:,}")
                + (f"{r['ratio']:.1f}", f"{r['bytes_float16']:,}", marks[r["ok"]] if "ok" in r else "")
                for r in report["sizes"]
            ],
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"leave out the timing at d = {TIMED_WIDTH} (minutes for POT)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads for both (default: torch's)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of ours (default 5, the median counts)")
    parser.add_argument("--pot-backend", choices=("numpy", "torch"), default="numpy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.threads < 1 or options.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        with threadpool_limits(options.threads):
            report: dict[str, Any] = {"machine": machine(options.threads, options.pot_backend), "seed": options.seed}
            report["sizes"] = sizes(options.seed)
            report["equality"] = equality(options.seed, options.pot_backend)
            report["speed"] = None if options.quick else speed(options.seed, options.pot_backend, options.repeats)
    finally:
        torch.set_num_threads(before)
    checks = [*report["equality"], *report["sizes"], *([report["speed"]] if report["speed"] else [])]
    report["ok"] = all(row.get("ok", True) for row in checks)
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        show(report)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
