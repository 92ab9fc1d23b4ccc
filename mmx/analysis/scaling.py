"""Scaling laws of runs, with bootstrap intervals.

    power       L(C) = a C^-b, with a constant E + a C^-b; least squares on log loss (arXiv 2501.08313, section 2.2.2)
    envelope    the same law, fitted to the lower envelope only: the best run of each compute budget, unless a cheaper run is
                at least as good
    chinchilla  L(N, D) = E + A / N^alpha + B / D^beta; Huber's loss with delta 1e-3 on log loss (arXiv 2203.15556, D.3).
                With C = 6 N D the loss is lowest at N_opt = G (C / 6)^(beta / (alpha + beta)), D_opt = C / (6 N_opt),
                G = (alpha A / (beta B))^(1 / (alpha + beta))
    isoflop     for each compute budget, one parabola of loss in log N and one in log D; lines through the logarithms of their
                minima are N_opt(C) and D_opt(C). The two are fitted separately: their exponents need not add up to 1
    moe         L(P, T|E) = d + a P^alpha + b T^beta + c (P T)^gamma for each number of experts E; Huber's loss as above
                (arXiv 2501.08313, eq 14; the paper gives neither the fitting method nor the fitted values)

C is compute in FLOPs; N and P are parameters; D and T are tokens. Every law except isoflop is a sum of powers
(mmx.analysis.power_sums). The bootstrap draws runs with replacement. For isoflop it keeps the fitted parabolas
and adds residuals drawn from all budgets. A 95 % interval is symmetric about the value (about its logarithm for coefficients).
Its half width is the distance from the value to the 2.5 % or the 97.5 % percentile of the resamples, whichever is further away.
For few runs it is widened by the quotient of Student's t quantile and the normal one.

Array axes: R, I, K and J as in power_sums; G compute budgets.
"""
import math
from typing import NamedTuple

import numpy as np
from scipy import special

from mmx.analysis import power_sums
from mmx.analysis.runs import Runs
from mmx.config import ConfigError

FORMULAS = {"power": "L(C) = a C^-b", "envelope": "L(C) = a C^-b on the lower envelope",
            "chinchilla": "L(N, D) = E + A / N^alpha + B / D^beta", "isoflop": "N_opt(C) and D_opt(C) = coefficient C^exponent",
            "moe": "L(P, T|E) = d + a P^alpha + b T^beta + c (P T)^gamma"}
HUBER = 1e-3                    # residual at which Huber's loss turns from a square to a line
LEAST_SQUARES = 1e3             # a delta that no residual of log losses reaches
SIZES, BUDGETS = 4, 3           # least sizes of an IsoFLOP parabola, and least budgets of a line through the minima


class Quantity(NamedTuple):
    """A fitted number and its 95 % interval; `low` and `high` are nan without an interval."""
    value: float
    low: float
    high: float
    note: str = ""


class Fit(NamedTuple):
    """One law fitted to one set of runs."""
    runs: Runs
    used_I: np.ndarray              # True for the runs that the law was fitted to
    fitted_I: np.ndarray            # losses that the law gives for those runs
    quantities: dict[str, Quantity]
    notes: list[str]
    minima: list[dict]              # isoflop only: flops, N_opt, D_opt, sizes and loss of each budget
    tolerance: float


def fit(runs: Runs, law: str, irreducible: bool = False, tolerance: float = 0.2, resamples: int = 1000, seed: int = 0) -> Fit:
    """Fits one law to one set of runs.

    Args:
      law: a key of FORMULAS.
      irreducible: add the constant E to the laws power and envelope.
      tolerance: runs belong to the same compute budget if their FLOPs differ by at most this fraction.
      resamples: number of bootstrap resamples.
    Raises:
      ConfigError: there are too few runs.
    """
    rng = np.random.default_rng(seed)
    if law == "isoflop":
        return _fit_isoflop(runs, tolerance, resamples, rng)
    used_I = envelope(runs.flops, runs.loss, tolerance) if law == "envelope" else np.ones(len(runs.loss), bool)
    N_I, D_I, C_I = (None if column is None else np.log(column[used_I]) for column in runs[1:4])
    x_KI = np.array({"chinchilla": (N_I, D_I), "moe": (N_I, D_I, None if N_I is None or D_I is None else N_I + D_I)}
                    .get(law, (C_I,)))
    constant = irreducible or law in ("chinchilla", "moe")
    _check_count(runs.label, law, x_KI, constant)
    delta = HUBER if constant and len(x_KI) > 1 else LEAST_SQUARES
    y_I, mean_K = np.log(runs.loss[used_I]), x_KI.mean(1)
    x_KI = x_KI - mean_K[:, None]
    bounds = power_sums.search_bounds(y_I, len(x_KI), constant)
    minima_RJ = power_sums.solve(x_KI, y_I, constant, delta, bounds)
    theta_J = minima_RJ[0]
    draws_RJ = power_sums.bootstrap(minima_RJ, x_KI, y_I, delta, bounds, resamples, rng)
    fitted_I = np.exp(power_sums.log_sum(theta_J[None], x_KI)[0][0])
    widening = _widening(len(y_I) - len(theta_J))
    values, draws = (_quantities(law, theta_RJ, mean_K, constant) for theta_RJ in (theta_J[None], draws_RJ))
    bound_notes = _bound_notes(law, theta_J, bounds, len(x_KI), constant)
    found = {name: _interval(_is_exponent(law, name), values[name][0], draws[name], widening, bound_notes.get(name, ""))
             for name in values}
    return Fit(runs, used_I, fitted_I, found, _notes(runs, law, used_I), [], tolerance)


def _check_count(label, law, x_KI, constant):
    """Raises ConfigError if there are too few runs, or too few different values of a feature."""
    params = 2 * len(x_KI) + constant
    needed, values = 2 + constant, min(len(set(x_I.round(9))) for x_I in x_KI)
    if x_KI.shape[1] < params + 2 or values < needed:
        column = "params and of tokens" if len(x_KI) > 1 else "FLOPs"
        raise ConfigError(f"{label + ': ' if label else ''}too few runs {'on the envelope ' * (law == 'envelope')}"
                          f"for --law {law}, which fits {params} parameters: it needs {params + 2} runs with {needed} distinct "
                          f"values of {column}; given: {x_KI.shape[1]} runs, distinct values: {values}")


def envelope(C_I, loss_I, tolerance: float) -> np.ndarray:
    """True for each run that is the best of its compute budget and better than every best run of a cheaper budget."""
    best = [members[np.argmin(loss_I[members])] for members in budgets(C_I, tolerance)]
    used_I = np.zeros(len(C_I), bool)
    used_I[[i for number, i in enumerate(best) if not number or loss_I[i] < min(loss_I[best[:number]])]] = True
    return used_I


def budgets(C_I, tolerance: float) -> list[np.ndarray]:
    """Groups runs by compute; returns the run numbers of each group, in order of compute.

    The largest possible group of runs whose FLOPs lie within a factor of 1 + tolerance is taken first, and so on.
    """
    left_I, x_I, groups = np.argsort(C_I, kind="stable"), np.log(C_I), []
    while len(left_I):
        end_I = np.searchsorted(x_I[left_I], x_I[left_I] + math.log1p(tolerance) + 1e-9, side="right")
        first = np.argmax(end_I - np.arange(len(left_I)))
        groups.append(left_I[first:end_I[first]])
        left_I = np.delete(left_I, np.s_[first:end_I[first]])
    return sorted(groups, key=lambda group: x_I[group[0]])


def _quantities(law, theta_RJ, mean_K, constant) -> dict[str, np.ndarray]:
    """The quantities of a law, _R each, with the signs of its formula: exponents, and logarithms of coefficients."""
    K = len(mean_K)
    exponent_KR, log_KR = theta_RJ[:, -K:].T, theta_RJ[:, :K].T + theta_RJ[:, -K:].T * mean_K[:, None]
    floor = {"d" if law == "moe" else "E": theta_RJ[:, K]} if constant else {}
    if law == "moe":
        return {**floor, **dict(zip("abc", log_KR)), **dict(zip(("alpha", "beta", "gamma"), -exponent_KR))}
    if law != "chinchilla":
        return {**floor, "a": log_KR[0], "b": exponent_KR[0]}
    (alpha, beta), (A, B) = exponent_KR, log_KR
    with np.errstate(invalid="ignore", divide="ignore"):
        alpha_, beta_ = (np.where((alpha > 0) & (beta > 0), e, np.nan) for e in (alpha, beta))
        log_G = (np.log(alpha_ / beta_) + A - B) / (alpha_ + beta_)
        growth = beta_ / (alpha_ + beta_)
        return {**floor, "A": A, "B": B, "alpha": alpha, "beta": beta,
                "N_opt coefficient": log_G - growth * np.log(6), "N_opt exponent": growth,
                "D_opt coefficient": -log_G - (1 - growth) * np.log(6), "D_opt exponent": 1 - growth}


def _is_exponent(law, name) -> bool:
    return name in ("alpha", "beta", "gamma", *("b" * (law != "moe"))) or name.endswith("exponent")


def _widening(freedom: int) -> float:
    """Student's t over the normal distribution, of the 97.5 % quantiles."""
    return float(special.stdtrit(freedom, 0.975) / special.ndtri(0.975))


def _interval(exponent: bool, value, draws_R, widening, note="", reason="no optimum: an exponent is not positive") -> Quantity:
    """The 95 % interval of a value, from its resamples (see the module's docstring).

    Percentiles alone contain the true value of skewed exponents (gamma of the law moe) in 90 of 100 sets, not in 95.

    Args:
      exponent: False for a coefficient, whose value and draws are logarithms, because it may exceed the range of a float.
      draws_R: values of the resamples; nan where a resample has none.
      reason: the note if the value itself is nan.
    """
    if not math.isfinite(value):
        return Quantity(math.nan, math.nan, math.nan, reason)
    back, finite_R = float if exponent else np.exp, draws_R[np.isfinite(draws_R)]
    if len(finite_R) < len(draws_R):
        note = note or f"undefined in {1 - len(finite_R) / len(draws_R):.1%} of the resamples"
    half = widening * max(abs(end - value) for end in np.percentile(finite_R, (2.5, 97.5))) if len(finite_R) else math.nan
    with np.errstate(over="ignore", under="ignore"):
        value, low, high = (float(back(x)) for x in (value, value - half, value + half))
    if exponent and low <= 0 <= high:
        note = note or "the interval contains 0"
    return Quantity(value, low, high, note)


def _bound_notes(law, theta_J, bounds, K, constant) -> dict[str, str]:
    """Notes on the quantities that ended at a bound of the search."""
    names = {"chinchilla": ("A", "B", "E", "alpha", "beta"), "moe": ("a", "b", "c", "d", "alpha", "beta", "gamma")}.get(
        law, ("a", "E", "b") if constant else ("a", "b"))
    notes = {}
    for j, name in enumerate(names):
        if theta_J[j] <= bounds[0, j] + 0.01 or theta_J[j] >= bounds[1, j] - 0.01:
            is_constant = K <= j < len(theta_J) - K
            notes[name] = "at a bound of the search: 0 fits as well" if is_constant else "at a bound of the search"
    return notes


def _notes(runs, law, used_I) -> list[str]:
    notes = []
    if law == "envelope" and runs.params is not None:
        best_I = runs.params[used_I]
        edge = int(((best_I == runs.params.min()) | (best_I == runs.params.max())).sum())
        if edge:
            notes.append(f"{edge} of the {len(best_I)} runs on the envelope are of the smallest or the largest model")
    # 5 %: published FLOPs are rounded, or include attention. This decides only whether the note is printed.
    if law == "chinchilla" and not np.allclose(runs.flops, 6 * runs.params * runs.tokens, rtol=0.05):
        notes.append("the FLOPs in the file are not 6 N D; N_opt(C) and D_opt(C) assume C = 6 N D")
    return notes


def _fit_isoflop(runs: Runs, tolerance, resamples, rng) -> Fit:
    groups = budgets(runs.flops, tolerance)
    kept = [group for group in groups if len(set(runs.params[group])) >= SIZES]
    if len(kept) < BUDGETS:
        raise ConfigError(f"{runs.label + ': ' if runs.label else ''}{len(kept)} of {len(groups)} compute budgets have {SIZES} "
                          f"sizes or more: --law isoflop needs {BUDGETS} such budgets. --tolerance {tolerance:g} is how far "
                          "FLOPs within a budget may differ")
    notes = [f"left out {len(groups) - len(kept)} of {len(groups)} budgets, which have fewer than {SIZES} sizes"] * (
        len(kept) < len(groups))
    used_I, fitted_I, residuals = np.zeros(len(runs.loss), bool), np.zeros(len(runs.loss)), []
    for group in kept:
        used_I[group] = True
        loss_I = runs.loss[group]
        V_I3, inverse_3I = _parabola(np.log(runs.params[group]))
        fitted_I[group] = V_I3 @ (inverse_3I @ loss_I)
        free_I = np.sqrt(np.maximum(1 - (V_I3 * inverse_3I.T).sum(1), 1e-2))
        residuals.append((loss_I - fitted_I[group]) / free_I / loss_I.min())
    residual_I = np.concatenate(residuals)
    C_G = np.array([np.exp(np.log(runs.flops[group]).mean()) for group in kept])
    loss_GI = [runs.loss[group][None] for group in kept]
    drawn_GI = [fitted_I[group] + runs.loss[group].min() * residual_I[rng.integers(0, len(residual_I), (resamples, len(group)))]
                for group in kept]
    freedom, quantities, minima_of = len(residual_I) - 3 * len(kept), {}, {}
    for name, column in (("N_opt", runs.params), ("D_opt", runs.tokens)):
        values, minima_of[name] = _line(C_G, column, kept, loss_GI)
        draws, _ = _line(C_G, column, kept, drawn_GI)
        for part, value, draw_R in zip(("coefficient", "exponent"), values, draws):
            quantities[f"{name} {part}"] = _interval(part == "exponent", value[0], draw_R, _widening(freedom),
                                                     reason="no line: fewer than 2 budgets have a minimum")
    minima, more = _minima(runs, kept, C_G, *(np.exp(minima_of[name][:, 0]) for name in ("N_opt", "D_opt")))
    return Fit(runs, used_I, fitted_I[used_I], quantities, notes + more, minima, tolerance)


def _minima(runs, groups, C_G, N_G, D_G) -> tuple[list[dict], list[str]]:
    """A row of figures for each budget, and notes on budgets whose minimum is missing or outside the sizes of the runs."""
    rows, notes = [], []
    for C, group, N, D in zip(C_G, groups, N_G.tolist(), D_G.tolist()):
        size_I = runs.params[group]
        curve_3 = _parabola(np.log(size_I))[1] @ runs.loss[group]
        loss = float(curve_3[0] - curve_3[1] ** 2 / (4 * curve_3[2])) if math.isfinite(N) else math.nan
        rows.append({"flops": float(C), "N_opt": N, "D_opt": D, "sizes": len(set(size_I)), "loss": loss})
        if not math.isfinite(N):
            notes.append(f"the budget of {C:.3g} FLOPs has no minimum and is left out")
        elif not size_I.min() <= N <= size_I.max():
            notes.append(f"the minimum of the budget of {C:.3g} FLOPs is outside the range of its sizes")
    return rows, notes


def _parabola(x_I) -> tuple[np.ndarray, np.ndarray]:
    """The design matrix of a parabola in `x_I` less its mean, and the matrix's pseudo-inverse."""
    V_I3 = np.vander(x_I - x_I.mean(), 3, increasing=True)
    return V_I3, np.linalg.pinv(V_I3)


def _line(C_G, column_I, groups, losses_GRI):
    """Fits a parabola of loss in log `column_I` to each budget, and a line through the logarithms of the minima.

    A minimum is nan if the parabola has none, or if it is further outside the runs than half of their range.

    Returns:
      (log coefficient_R, exponent_R) of the line, and the log minima_GR.
    """
    log_min_GR = []
    for group, loss_RI in zip(groups, losses_GRI):
        x_I = np.log(column_I[group])
        _, one_R, two_R = _parabola(x_I)[1] @ loss_RI.T
        with np.errstate(divide="ignore", invalid="ignore"):
            log_min_R = np.where(two_R > 0, -one_R / (2 * two_R), np.nan)
        log_min_GR.append(np.where(np.abs(log_min_R) < 1.5 * np.ptp(x_I), log_min_R + x_I.mean(), np.nan))
    log_min_GR, x_G = np.array(log_min_GR), np.log(C_G)
    exists_GR = np.isfinite(log_min_GR)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        count_R = exists_GR.sum(0)
        x_R, y_R = (x_G @ exists_GR) / count_R, np.where(exists_GR, log_min_GR, 0).sum(0) / count_R
        dx_GR = np.where(exists_GR, x_G[:, None] - x_R, 0)
        slope_R = (dx_GR * np.where(exists_GR, log_min_GR - y_R, 0)).sum(0) / (dx_GR ** 2).sum(0)
        return (y_R - slope_R * x_R, slope_R), log_min_GR
