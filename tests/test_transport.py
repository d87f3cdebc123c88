"""Linear transport against POT, against closed forms, and against its own invariants (float64 oracles)."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import ot
import pytest
import torch
from torch import Tensor

from errata.errors import ConfigError, EditError, ShapeError
from errata.maths.transport import (
    LinearMap,
    gaussian_distance,
    gaussian_transport,
    mean_shift,
    noisy_neighbours,
    spread,
)


def sample(n: int, d: int, seed: int, *, decay: float = 0.7, scale: float = 4.0) -> Tensor:
    """States (n, d) with a power-law spectrum in directions and around a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    mean = 5 * torch.randn(d, generator=generator, dtype=torch.float64)
    std = scale * torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    x = std * torch.randn(n, d, generator=generator, dtype=torch.float64)
    for mirror in torch.nn.functional.normalize(torch.randn(2, d, generator=generator, dtype=torch.float64), dim=1):
        x = x - 2 * (x @ mirror)[:, None] * mirror
    return x + mean


def covariance(x: Tensor, rho: float) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / len(x) + rho * torch.eye(x.shape[1], dtype=x.dtype)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def rms(x: Tensor) -> float:
    return float(x.square().sum(-1).mean().sqrt())


CASES = [(64, 200, 100), (256, 200, 100), (256, 60, 40), (64, 5, 90), (48, 12, 3)]


@pytest.fixture(params=CASES, ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    d, n_s, n_t = request.param
    return sample(n_s, d, seed=d), sample(n_t, d, seed=d + 1, decay=0.5, scale=3.0)


@pytest.mark.parametrize("relative", [True, False])
def test_equals_pot(pair: tuple[Tensor, Tensor], relative: bool) -> None:
    x_s, x_t = pair
    rho = 1e-2 * spread(x_s) ** 2 if relative else 1e-2
    A, b = gaussian_transport(x_s, x_t, reg=1e-2, relative=relative).dense()
    A_pot, b_pot = ot.gaussian.empirical_bures_wasserstein_mapping(x_s, x_t, reg=rho)
    assert relative_error(A, A_pot) <= 1e-5
    assert relative_error(b, b_pot[0]) <= 1e-5


def test_equals_pot_linear_transport() -> None:
    x_s, x_t = sample(200, 64, seed=0), sample(100, 64, seed=1)
    pot = ot.da.LinearTransport(reg=1e-2).fit(Xs=x_s.numpy(), Xt=x_t.numpy())
    ours = gaussian_transport(x_s, x_t, reg=1e-2, relative=False)
    assert relative_error(ours(x_s), torch.from_numpy(pot.transform(Xs=x_s.numpy()))) <= 1e-8
    assert relative_error(ours.inverse()(x_t), torch.from_numpy(pot.inverse_transform(Xt=x_t.numpy()))) <= 1e-8


@pytest.mark.parametrize("reg", [1e-2, 1e-6, 1e-10])
@pytest.mark.parametrize("d", [64, 300])
def test_closed_form_when_covariances_commute(d: int, reg: float) -> None:
    """Target = source stretched along its own principal axes: A = sqrt((t + rho) / (s + rho)) per axis, at any reg.

    POT itself has no digits left at the small ends (it squares the condition number), so this is the sharper oracle.
    """
    x_s = sample(100, d, seed=3)
    U, s, axes = torch.linalg.svd(x_s - x_s.mean(0), full_matrices=False)
    stretch = torch.linspace(0.5, 1.5, len(s), dtype=torch.float64).roll(7)
    x_t = (U * s * stretch) @ axes + 3
    rho, var = reg * spread(x_s) ** 2, s**2 / len(x_s)
    factor = ((stretch**2 * var + rho) / (var + rho)).sqrt()
    wanted = torch.eye(d, dtype=torch.float64) + (axes.T * (factor - 1)) @ axes
    found = gaussian_transport(x_s, x_t, reg=reg)
    assert relative_error(found.dense()[0], wanted) <= 1e-10
    assert found.rank <= 99  # 100 centred states: no direction made of rounding


def test_invariants(pair: tuple[Tensor, Tensor]) -> None:
    x_s, x_t = pair
    n_s, d = x_s.shape
    rho = 1e-2 * spread(x_s) ** 2
    fitted = gaussian_transport(x_s, x_t)
    A, b = fitted.dense()
    torch.testing.assert_close(fitted(x_s.mean(0)), x_t.mean(0), rtol=1e-9, atol=1e-9)
    assert relative_error(A @ covariance(x_s, rho) @ A, covariance(x_t, rho)) <= 1e-8
    assert torch.equal(A, A.T) or relative_error(A.T, A) <= 1e-14
    assert torch.linalg.eigvalsh(A).min() > 0
    assert fitted.lam.min() > -1
    assert fitted.rank <= min(d, n_s + len(x_t) - 2)
    torch.testing.assert_close(fitted.P.T @ fitted.P, torch.eye(fitted.rank, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(fitted(x_s), x_s @ A + b, rtol=1e-9, atol=1e-9)
    assert fitted.nbytes == 8 * (d * fitted.rank + 2 * d + fitted.rank)
    assert fitted.P.is_contiguous()


def test_same_sample_gives_the_identity(pair: tuple[Tensor, Tensor]) -> None:
    x_s, _ = pair
    same = gaussian_transport(x_s, x_s)
    assert same.rank == 0
    torch.testing.assert_close(same(x_s), x_s, rtol=1e-14, atol=1e-13)


def test_inverse_undoes(pair: tuple[Tensor, Tensor]) -> None:
    x_s, x_t = pair
    fitted = gaussian_transport(x_s, x_t)
    assert relative_error(fitted.inverse()(fitted(x_s)), x_s) <= 1e-10
    assert relative_error(fitted(fitted.inverse()(x_t)), x_t) <= 1e-10
    assert relative_error(fitted.inverse().dense()[0] @ fitted.dense()[0], torch.eye(x_s.shape[1]).double()) <= 1e-9
    flat = LinearMap(torch.zeros(2), torch.zeros(2), torch.eye(2)[:, :1], torch.tensor([-1.0]))
    with pytest.raises(ShapeError, match="above -1"):
        flat.inverse()


def test_outside_the_span_only_the_shift_acts() -> None:
    x_s, x_t = sample(20, 256, seed=5), sample(10, 256, seed=6)
    fitted = gaussian_transport(x_s, x_t)
    x = sample(4, 256, seed=7)
    span = torch.linalg.qr(torch.cat([x_s - fitted.m_s, x_t - fitted.m_t]).T)[0]
    off = (x - fitted.m_s) - (x - fitted.m_s) @ span @ span.T
    torch.testing.assert_close(fitted(fitted.m_s + off), fitted.m_t + off, rtol=1e-10, atol=1e-10)


def test_mean_shift() -> None:
    x_s, x_t = sample(20, 32, seed=5), sample(10, 32, seed=6)
    shift = mean_shift(x_s, x_t)
    assert shift.rank == 0
    torch.testing.assert_close(shift(x_s), x_s + (x_t.mean(0) - x_s.mean(0)))
    torch.testing.assert_close(shift.inverse()(shift(x_s)), x_s)
    A, b = shift.dense()
    assert torch.equal(A, torch.eye(32, dtype=torch.float64))
    torch.testing.assert_close(b, x_t.mean(0) - x_s.mean(0))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("relative", [True, False])
def test_a_sample_without_variance_gives_a_pure_shift(n: int, relative: bool) -> None:
    real, flat = sample(20, 32, seed=5), sample(1, 32, seed=6).repeat(n, 1)
    zero = torch.zeros(n, 32)
    for x_s, x_t in ((real, flat), (flat, real), (flat, flat), (zero, real), (zero, zero), (flat.float(), real)):
        fitted = gaussian_transport(x_s, x_t, relative=relative)
        assert fitted.rank == 0
        torch.testing.assert_close(fitted(x_s.double().mean(0)), x_t.double().mean(0))


def test_truncation_follows_what_states_do_not_lam() -> None:
    """A strong direction in which no state varies moves nothing; ranking by |lam| alone would keep it first."""
    d, generator = 16, torch.Generator().manual_seed(0)
    P = torch.eye(d, dtype=torch.float64)[:, :3]
    strengths = torch.tensor([30.0, 0.5, 0.1], dtype=torch.float64)
    zero = torch.zeros(d, dtype=torch.float64)
    full = LinearMap(zero, zero + 1, P, strengths)
    std = torch.full((d,), 1.0, dtype=torch.float64)
    std[0], std[1], std[2] = 1e-4, 10.0, 2.0
    states = std * torch.randn(500, d, generator=generator, dtype=torch.float64)
    kept = full.truncate(states, rank=1)
    assert kept.lam.tolist() == [0.5]
    by_lam = LinearMap(full.m_s, full.m_t, P[:, :1], full.lam[:1])
    assert rms(full(states) - kept(states)) < 0.1 * rms(full(states) - by_lam(states))
    assert full.truncate(states, tolerance=0.01).lam.tolist() == [0.5, 0.1]
    torch.testing.assert_close(full.contributions(states), full.lam * states[:, :3].square().mean(0).sqrt())


def test_truncation_states_its_error_and_is_the_fewest(pair: tuple[Tensor, Tensor]) -> None:
    x_s, x_t = pair
    full = gaussian_transport(x_s, x_t)
    states = torch.cat([x_s, sample(30, x_s.shape[1], seed=11)])
    moved = rms(full(states) - states - (full.m_t - full.m_s))
    last = -1
    for tolerance in (1.0, 0.3, 0.1, 0.01, 1e-4):
        cut = full.truncate(states, tolerance)
        assert cut.error == pytest.approx(rms(full(states) - cut(states)) / moved, rel=1e-6)
        assert cut.error <= tolerance
        assert cut.rank >= last
        last = cut.rank
        if cut.rank:
            assert full.truncate(states, rank=cut.rank - 1).error > tolerance
    assert full.truncate(states, tolerance=1.0).rank == 0
    everything = full.truncate(states, rank=10**6)
    assert (everything.rank, everything.error) == (full.rank, 0.0)
    assert full.truncate(full.m_s[None], tolerance=0.0).rank == 0  # at the source mean the full map is the shift
    with pytest.raises(ConfigError):
        full.truncate(states)
    with pytest.raises(ConfigError):
        full.truncate(states, 0.1, 3)
    with pytest.raises(ConfigError):
        full.truncate(states, tolerance=1.5)
    with pytest.raises(ConfigError):
        full.truncate(states, rank=-1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_half_precision_costs_its_rounding_unit(dtype: torch.dtype, bound: float) -> None:
    """Against what the map does beyond the shift, P in half precision errs by less than twice its rounding unit."""
    x_s, x_t = sample(100, 256, seed=8), sample(60, 256, seed=9)
    full = gaussian_transport(x_s, x_t)
    half = full.to(dtype)
    assert (half.P.dtype, half.m_s.dtype, half.m_t.dtype, half.lam.dtype) == (dtype, *[torch.float32] * 3)
    moved = rms(full(x_s) - x_s - (full.m_t - full.m_s))
    assert rms(half(x_s) - full(x_s)) <= 2 * bound * moved
    assert relative_error(half.inverse()(half(x_s)), x_s) <= 4 * bound
    assert half.to(means=dtype).m_s.dtype == dtype
    assert half.nbytes < full.nbytes / 3.8


def test_dtypes_of_the_call() -> None:
    fitted = gaussian_transport(sample(20, 32, seed=1), sample(20, 32, seed=2))
    x = sample(6, 32, seed=3).reshape(2, 3, 32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert fitted(x.to(dtype)).dtype == dtype
        assert fitted(x.to(dtype)).shape == x.shape
    # computed in float32 at least: a half-precision state is rounded once, at the end
    low = x.to(torch.bfloat16)
    assert torch.equal(fitted.to(torch.bfloat16)(low), fitted.to(torch.bfloat16)(low.float()).to(torch.bfloat16))
    assert fitted.dense()[0].dtype == torch.float64
    assert fitted.to(torch.float16).dense()[0].dtype == torch.float32


def test_fitting_is_deterministic_and_leaves_no_trace() -> None:
    x_s, x_t = sample(40, 64, seed=1), sample(30, 64, seed=2)
    before, state = x_s.clone(), torch.get_rng_state()
    one, two = gaussian_transport(x_s, x_t), gaussian_transport(x_s, x_t)
    assert all(torch.equal(getattr(one, n), getattr(two, n)) for n in ("m_s", "m_t", "P", "lam"))
    assert torch.equal(x_s, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_noisy_neighbours() -> None:
    x = sample(10, 2000, seed=1)
    unit = 0.1 * spread(x)
    made = noisy_neighbours(x, unit, copies=4, generator=torch.Generator().manual_seed(0))
    again = noisy_neighbours(x, unit, copies=4, generator=torch.Generator().manual_seed(0))
    assert made.shape == (50, 2000)
    assert torch.equal(made, again)
    assert torch.equal(made[:10], x)
    assert (made[10:] - x.repeat(4, 1)).std() == pytest.approx(unit, rel=0.02)
    assert torch.equal(noisy_neighbours(x, 0.0, copies=0), x)
    with pytest.raises(ConfigError):
        noisy_neighbours(x, -1.0)


def dense_distance(x: Tensor, reference: Tensor, reg: float) -> Tensor:
    """The textbook form, leaving each reference state out in turn."""
    rho = reg * spread(reference) ** 2

    def distance(y: Tensor, others: Tensor) -> Tensor:
        y = y - others.mean(0)
        solved: Tensor = torch.linalg.solve(covariance(others, rho), y.T).T
        return (y * solved).sum(-1)

    rows = torch.arange(len(reference))
    left_out = torch.cat([distance(reference[i : i + 1], reference[rows != i]) for i in rows.tolist()])
    return (distance(x, reference) / left_out.mean()).sqrt()


@pytest.mark.parametrize(("m", "d"), [(12, 40), (60, 24)])
def test_gaussian_distance_equals_the_textbook_form(m: int, d: int) -> None:
    both = sample(m + 8, d, seed=4)
    reference, x = both[:m], both[m:]
    for reg in (1e-2, 1e-5):
        torch.testing.assert_close(
            gaussian_distance(x, reference, reg=reg), dense_distance(x, reference, reg), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("d", [16, 256, 1024])
@pytest.mark.parametrize("reg", [1e-1, 1e-2, 1e-4])
def test_gaussian_distance_is_about_one_for_further_states(d: int, reg: float) -> None:
    both = sample(400, d, seed=4)
    reference, held_out = both[:200], both[200:]
    far = gaussian_distance(held_out, reference, reg=reg)
    assert far.square().mean().sqrt() == pytest.approx(1.0, abs=0.15)
    assert gaussian_distance(reference, reference, reg=reg).square().mean() < 1
    assert gaussian_distance(sample(20, d, seed=99), reference, reg=reg).min() > 2  # another mean, other directions


def test_gaussian_distance_without_variance() -> None:
    one = sample(1, 8, seed=1)
    assert gaussian_distance(torch.cat([one, one + 1]), one.repeat(3, 1)).tolist() == [0.0, float("inf")]
    assert gaussian_distance(one + 1, one).tolist() == [float("inf")]


@pytest.mark.parametrize("function", [gaussian_transport, mean_shift, gaussian_distance])
def test_bad_input(function: object) -> None:
    assert callable(function)
    good = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for bad in (torch.zeros(0, 8), torch.zeros(5, 0), torch.zeros(8), torch.zeros(5, 7)):
        with pytest.raises(ShapeError):
            function(good, bad)
        with pytest.raises(ShapeError):
            function(bad, good)
    with pytest.raises(EditError, match="finite"):
        function(good, good / 0)


def test_bad_configuration_and_shapes() -> None:
    good = sample(5, 8, seed=0)
    for reg in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError):
            gaussian_transport(good, good, reg=reg)
        with pytest.raises(ConfigError):
            gaussian_distance(good, good, reg=reg)
    with pytest.raises(ShapeError):
        LinearMap(torch.zeros(8), torch.zeros(8), torch.zeros(8, 2), torch.zeros(3))
    with pytest.raises(ShapeError):
        LinearMap(torch.zeros(8), torch.zeros(7), torch.zeros(8, 2), torch.zeros(2))
    with pytest.raises(ShapeError, match="width 8"):
        mean_shift(good, good)(torch.zeros(3, 7))
    with pytest.raises(ShapeError):
        gaussian_transport(good, good + 1).truncate(torch.zeros(3, 7), 0.1)


@pytest.mark.slow
def test_benchmark_script_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """POT at d = 256, 768 and 1600, by the script that measures it (20 seconds on one core)."""
    path = Path(__file__).parents[1] / "benchmarks" / "transport.py"
    spec = importlib.util.spec_from_file_location("benchmarks_transport", path)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    try:
        spec.loader.exec_module(script)
        assert script.main(["--quick", "--json"]) == 0
    finally:
        del sys.modules[spec.name]
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert {row["d"] for row in found["equality"]} == {256, 768, 1600}
