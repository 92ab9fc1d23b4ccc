"""`mmx fit`: scaling laws of runs, with bootstrap intervals.

    power       L(C) = a C^-b, with a constant E + a C^-b; least squares on log loss (arXiv 2501.08313, section 2.2.2)
    envelope    the same over the lower envelope: the best run of each compute, where no cheaper one beats it
    chinchilla  L(N, D) = E + A / N^alpha + B / D^beta; Huber with 1e-3 on log loss (arXiv 2203.15556, D.3). With C = 6 N D
                the least loss is at N_opt = G (C / 6)^(beta / (alpha + beta)), D_opt = C / (6 N_opt),
                G = (alpha A / (beta B))^(1 / (alpha + beta))
    isoflop     a parabola of loss in log N, and one in log D, for each compute budget; lines through the logarithms of their
                minima are N_opt(C) and D_opt(C), fitted apart: their exponents need not add up to 1
    moe         L(P, T|E) = d + a P^alpha + b T^beta + c (P T)^gamma for each number of experts E; Huber as above
                (arXiv 2501.08313, eq 14, which says neither how it was fitted nor what came out)

All but isoflop are sums of powers, log L = logsumexp(u_m - e_k x_k) with features x_k = log C, log N, ... about their means, so
that 25 k parameters and 1 T tokens are the same problem. L-BFGS goes from the best of a grid of shares and exponents, and
Gauss-Newton on to the last digit. Resamples draw runs with replacement (isoflop: residuals, within and across budgets) and
go on from the fit, all at once. A 95 % interval goes as far to both sides as the further of the 2.5 % and 97.5 %
percentiles, times Student's t over the normal's quantile, for few runs.

Axes: R resamples, I runs, K powers, M summands (powers and the constant), J parameters (M logarithms of summands at the
features' means, then K exponents).
"""
import csv
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import optimize, special

from mmx.config import ConfigError, nearest
from mmx.files import untrusted

LAWS = {"power": ("flops",), "envelope": ("flops",), "chinchilla": ("params", "tokens"), "moe": ("params", "tokens"),
        "isoflop": ("params", "tokens", "flops")}
FORMULAS = {"power": "L(C) = a C^-b", "envelope": "L(C) = a C^-b on the lower envelope",
            "chinchilla": "L(N, D) = E + A / N^alpha + B / D^beta", "isoflop": "N_opt(C) and D_opt(C) = coefficient C^exponent",
            "moe": "L(P, T|E) = d + a P^alpha + b T^beta + c (P T)^gamma"}
ROLES = ("params", "tokens", "flops", "loss")
HUBER, SQUARES = 1e-3, 1e3          # where Huber's loss turns from squares to lines; log losses never differ by 1e3
LEAST, MOST, STEEP = 7.0, 4.0, 4.0  # a summand is exp(-7) of the smallest loss to exp(4) of the largest; |exponent| is below
STARTS, ENDS = 24, 4               # that L-BFGS goes from; of its minima those that resamples go from
MOST_BYTES = 16 << 20               # of a file of runs
BLOCK = 4_000_000                   # numbers in the Jacobian of resamples that are computed at once
SIZES, BUDGETS = 4, 3               # of an IsoFLOP parabola, and of a line through their minima


class Runs(NamedTuple):
    """Columns of runs that are fitted together."""
    label: str
    params: np.ndarray | None
    tokens: np.ndarray | None
    flops: np.ndarray | None
    loss: np.ndarray


class Quantity(NamedTuple):
    """A fitted number and its interval; `low` and `high` are nan without one."""
    value: float
    low: float
    high: float
    note: str = ""


class Fit(NamedTuple):
    runs: Runs
    used_I: np.ndarray              # which runs the law was fitted to
    fitted_I: np.ndarray            # losses of these by the law
    found: dict[str, Quantity]
    notes: list[str]
    minima: list[dict]              # isoflop's: budget, N_opt, D_opt, loss
    tolerance: float


def read(path: str, law: str, columns: dict[str, str | None], by: list[str]) -> tuple[list[Runs], list[str]]:
    """The runs of a CSV or JSON lines file, those with the same values of `by` together; notes on what was derived.

    `columns` names the columns of ROLES; None is a column of the role's own name, where there is one.
    """
    every = _rows(path)
    rows = [(line, row) for line, row in every if not row.get("diverged")]      # of `mmx sweep`
    if not rows:
        raise ConfigError(f"{path} has no run that did not diverge")
    known = list(dict.fromkeys(name for _, row in rows for name in row))
    for flag, column in [*((f"--{role}", columns[role]) for role in ROLES), *(("--by", name) for name in by)]:
        if column is not None and column not in known:
            raise ConfigError(f"{path} has no column {column!r} ({flag}){_hint(column, known)}")
    names = {role: columns[role] or (role if role in known else None) for role in ROLES}
    if not by:
        by = [name for name in ("arch", "experts")[:1 + (law == "moe")] if name in known]
    notes = _derived(path, law, names, known)
    if len(rows) < len(every):
        notes.append(f"left out: {len(every) - len(rows)} that diverged")
    values = {role: np.array([_number(path, line, row, column) for line, row in rows])
              for role, column in names.items() if column}
    if "tokens" not in values and {"params", "flops"} <= values.keys():
        values["tokens"] = values["flops"] / (6 * values["params"])
    if "flops" not in values:
        values["flops"] = 6 * values["params"] * values["tokens"]
    labels = [", ".join(f"{name} {row.get(name)}" for name in by) for _, row in rows]
    return [Runs(label, *(values[role][[own == label for own in labels]] if role in values else None for role in ROLES))
            for label in dict.fromkeys(labels)], notes


def _derived(path, law, names, known) -> list[str]:
    """Notes on columns that others stand for; raises where the law's are not to be had."""
    have = {role for role, column in names.items() if column}
    needs = {*LAWS[law], "loss"}
    notes = []
    if "flops" in needs - have and {"params", "tokens"} <= have:
        notes.append(f"{path} has no FLOPs: 6 params tokens are taken")
        have.add("flops")
    if "tokens" in needs - have and {"params", "flops"} <= have:
        notes.append(f"{path} has no tokens: FLOPs / (6 params) are taken")
        have.add("tokens")
    missing = [role for role in ROLES if role in needs - have]
    if missing:
        raise ConfigError(f"--law {law} needs {', '.join(role for role in ROLES if role in needs)}, and {path} has no column "
                          f"{missing[0]!r}: name it by --{missing[0]} COL{_hint(missing[0], known)}")
    return notes


def _hint(column, known) -> str:
    hint = nearest(column, known)
    return hint if hint.startswith("; known") else f"{hint} known: {', '.join(known)}"


def _rows(path: str) -> list[tuple[int, dict]]:
    """(line, columns) of each row."""
    try:
        text = untrusted.content(path, MOST_BYTES).decode("utf-8-sig")
        if text.lstrip().startswith("{"):
            return [(number, _object(path, number, line)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        lines = text.splitlines()
        reader = csv.DictReader(lines, delimiter=max(",;\t", key=(lines or [""])[0].count), skipinitialspace=True, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is neither CSV nor JSON lines: not UTF-8 at byte {error.start}") from None
    except csv.Error as error:
        raise ConfigError(f"{path} is neither CSV nor JSON lines: {error}") from None
    for line, row in rows:
        if None in row or None in row.values():
            raise ConfigError(f"{path}:{line}: {'more' if None in row else 'fewer'} values than the header's "
                              f"{len(reader.fieldnames)} columns")
    if not rows:
        raise ConfigError(f"{path} has no rows: it needs a CSV header and a line a run, or a JSON object a line")
    return rows


def _object(path, number, line) -> dict:
    try:
        row = untrusted.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}:{number}: not a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{path}:{number}: not a JSON object")
    return row


def _number(path, line, row, column) -> float:
    try:
        value = float(row.get(column))
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{path}:{line}: {column} is {row.get(column)!r:.200}, and must be a positive number")
    return value


def fit(runs: Runs, law: str, irreducible: bool = False, tolerance: float = 0.2, resamples: int = 1000, seed: int = 0) -> Fit:
    """One law of one set of runs; `irreducible` adds E to power and envelope, `tolerance` joins FLOPs to budgets."""
    rng = np.random.default_rng(seed)
    if law == "isoflop":
        return _isoflop(runs, tolerance, resamples, rng)
    used_I = envelope(runs.flops, runs.loss, tolerance) if law == "envelope" else np.ones(len(runs.loss), bool)
    N_I, D_I, C_I = (None if column is None else np.log(column[used_I]) for column in runs[1:4])
    x_KI = np.array({"chinchilla": (N_I, D_I), "moe": (N_I, D_I, None if N_I is None or D_I is None else N_I + D_I)}
                    .get(law, (C_I,)))
    constant = irreducible or law in ("chinchilla", "moe")
    _enough(runs.label, law, x_KI, constant)
    delta, y_I, mean_K = (HUBER if constant and len(x_KI) > 1 else SQUARES), np.log(runs.loss[used_I]), x_KI.mean(1)
    x_KI = x_KI - mean_K[:, None]
    bounds = _bounds(y_I, len(x_KI), constant)
    ends_RJ = solve(x_KI, y_I, constant, delta, bounds)
    theta_J, draws_RJ = ends_RJ[0], _bootstrap(ends_RJ, x_KI, y_I, delta, bounds, resamples, rng)
    fitted_I = np.exp(_summed(theta_J[None], x_KI)[0][0])
    stretch = _stretch(len(y_I) - len(theta_J))
    values, draws = (_quantities(law, theta_RJ, mean_K, constant) for theta_RJ in (theta_J[None], draws_RJ))
    held = _held(law, theta_J, bounds, len(x_KI), constant)
    found = {name: _interval(_exponent(law, name), values[name][0], draws[name], stretch, held.get(name, ""))
             for name in values}
    return Fit(runs, used_I, fitted_I, found, _notes(runs, law, used_I), [], tolerance)


def _enough(label, law, x_KI, constant):
    """Raises where there are too few runs, or too few places of one feature."""
    params = 2 * len(x_KI) + constant
    places, most = 2 + constant, min(len(set(x_I.round(9))) for x_I in x_KI)
    if x_KI.shape[1] < params + 2 or most < places:
        raise ConfigError(f"{label + ': ' if label else ''}{x_KI.shape[1]} runs {'on the envelope ' * (law == 'envelope')}at "
                          f"{most} places are too few: --law {law} fits {params} parameters and needs {params + 2} runs, at "
                          f"{places} places in {'each of params and tokens' if len(x_KI) > 1 else 'FLOPs'}")


def envelope(C_I, loss_I, tolerance: float) -> np.ndarray:
    """Which runs are the best of their compute, and beaten by no cheaper one."""
    best = [members[np.argmin(loss_I[members])] for members in budgets(C_I, tolerance)]
    used_I = np.zeros(len(C_I), bool)
    used_I[[i for number, i in enumerate(best) if not number or loss_I[i] < min(loss_I[best[:number]])]] = True
    return used_I


def budgets(C_I, tolerance: float) -> list[np.ndarray]:
    """Runs whose compute is within 1 + tolerance of one another, the fullest such budgets first; in order of compute."""
    left_I, x_I, groups = np.argsort(C_I, kind="stable"), np.log(C_I), []
    while len(left_I):
        end_I = np.searchsorted(x_I[left_I], x_I[left_I] + math.log1p(tolerance) + 1e-9, side="right")
        first = np.argmax(end_I - np.arange(len(left_I)))
        groups.append(left_I[first:end_I[first]])
        left_I = np.delete(left_I, np.s_[first:end_I[first]])
    return sorted(groups, key=lambda group: x_I[group[0]])


def _summed(theta_RJ, x_KI) -> tuple[np.ndarray, np.ndarray]:
    """log L_RI, and each summand's share of it."""
    K = len(x_KI)
    log_RMI = np.repeat(theta_RJ[:, :-K, None], x_KI.shape[1], 2)
    log_RMI[:, :K] -= theta_RJ[:, -K:, None] * x_KI
    top_R1I = log_RMI.max(1, keepdims=True)
    share_RMI = np.exp(log_RMI - top_R1I)
    total_R1I = share_RMI.sum(1, keepdims=True)
    return (top_R1I + np.log(total_R1I))[:, 0], share_RMI / total_R1I


def _slopes(share_RMI, x_KI) -> np.ndarray:
    """d log L / d theta, _RJI."""
    return np.concatenate([share_RMI, -share_RMI[:, :len(x_KI)] * x_KI], 1)


def _huber(r_RI, delta, weight_RI=1.0):
    size_RI = np.abs(r_RI)
    return (weight_RI * np.where(size_RI <= delta, r_RI ** 2 / 2, delta * (size_RI - delta / 2))).sum(-1)


def _bounds(y_I, K, constant) -> np.ndarray:
    """Lowest and highest theta_J."""
    M = K + constant
    return np.array([[y_I.min() - LEAST] * M + [-STEEP] * K, [y_I.max() + MOST] * M + [STEEP] * K])


def _starts(y_I, K, constant) -> np.ndarray:
    """Grid of shares and exponents, theta_RJ."""
    M, exponents = K + constant, (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
    parts = [part for part in itertools.product((1, 3, 10), repeat=M) if min(part) == 1]
    return np.array([[*(np.log(np.array(part) / sum(part)) + np.median(y_I)), *steep]
                     for part in parts for steep in itertools.product(exponents, repeat=K)])


def solve(x_KI, y_I, constant: bool, delta: float, bounds) -> np.ndarray:
    """theta_RJ of the lowest minima of Huber's loss, the least first, by L-BFGS from many starts and Gauss-Newton on."""
    def loss(theta_J):
        log_RI, share_RMI = _summed(theta_J[None], x_KI)
        r_I = y_I - log_RI[0]
        scale = 1 / min(delta, 1)
        return scale * _huber(r_I, delta), -scale * _slopes(share_RMI, x_KI)[0] @ np.clip(r_I, -delta, delta)

    starts_RJ = _starts(y_I, len(x_KI), constant)
    parts = np.array_split(starts_RJ, math.ceil(starts_RJ.size * len(y_I) / BLOCK))
    order_R = np.argsort(np.concatenate([_huber(y_I - _summed(part, x_KI)[0], delta) for part in parts]), kind="stable")
    ends_RJ = np.array([optimize.minimize(loss, start_J, jac=True, method="L-BFGS-B", bounds=bounds.T,
                                          options={"maxiter": 300, "ftol": 1e-14, "gtol": 1e-10}).x
                        for start_J in starts_RJ[order_R[:STARTS]]])
    ends_RJ, left_R = descend(ends_RJ, x_KI, np.broadcast_to(1.0, (len(ends_RJ), len(y_I))), y_I, delta, bounds)
    ends = []
    for r in np.argsort(left_R, kind="stable"):
        if len(ends) < ENDS and all(np.abs(ends_RJ[r] - end_J).max() > 1e-3 for end_J in ends):
            ends.append(ends_RJ[r])
    return np.array(ends)


def descend(theta_RJ, x_KI, weight_RI, y_I, delta: float, bounds, steps: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Each row of `theta_RJ` to the nearest minimum of its weighted Huber loss, and that loss.

    Newton's matrix of Huber's loss has the runs within delta alone, and may be singular; that of reweighted squares is not,
    and its steps never rise. Their sum, weighed as Levenberg and Marquardt do, goes from the second to the first.
    """
    theta_RJ, eye = theta_RJ.copy(), np.eye(theta_RJ.shape[1])
    log_RI, share_RMI = _summed(theta_RJ, x_KI)
    r_RI = y_I - log_RI
    left_R, damp_R, going = _huber(r_RI, delta, weight_RI), np.ones(len(theta_RJ)), np.arange(len(theta_RJ))
    for _ in range(steps):
        if not len(going):
            break
        theta, r, weight = theta_RJ[going], r_RI[going], weight_RI[going]
        slopes_RJI, size = _slopes(share_RMI[going], x_KI), np.abs(r)
        down_RJ = (slopes_RJI @ (weight * np.clip(r, -delta, delta))[..., None])[..., 0]
        near, all_ = (weight * (size <= delta), weight * np.minimum(1, delta / np.maximum(size, 1e-300)))
        near_RJJ, all_RJJ = ((slopes_RJI * w[:, None]) @ slopes_RJI.transpose(0, 2, 1) for w in (near, all_))
        matrix_RJJ = near_RJJ + damp_R[going, None, None] * all_RJJ
        matrix_RJJ = matrix_RJJ + (1e-12 * np.trace(matrix_RJJ, axis1=1, axis2=2) + 1e-300)[:, None, None] * eye
        free_RJ = ~((theta <= bounds[0]) & (down_RJ < 0) | (theta >= bounds[1]) & (down_RJ > 0))
        matrix_RJJ = np.where(free_RJ[:, :, None] & free_RJ[:, None], matrix_RJJ, eye)
        theta = np.clip(theta + np.linalg.solve(matrix_RJJ, (down_RJ * free_RJ)[..., None])[..., 0], *bounds)
        log_RI, share = _summed(theta, x_KI)
        left = _huber(y_I - log_RI, delta, weight)
        better = left < left_R[going]
        ends = np.where(better, left_R[going] - left < 1e-13 * left_R[going] + 1e-24, damp_R[going] > 1e8)
        damp_R[going] = np.where(better, np.maximum(damp_R[going] / 8, 1e-9), damp_R[going] * 8)
        rows = going[better]
        theta_RJ[rows], r_RI[rows], share_RMI[rows], left_R[rows] = (
            theta[better], (y_I - log_RI)[better], share[better], left[better])
        going = going[~ends]
    return theta_RJ, left_R


def _bootstrap(ends_RJ, x_KI, y_I, delta, bounds, resamples, rng) -> np.ndarray:
    """theta_RJ of runs drawn with replacement, the best from all ends, in blocks that bound the memory."""
    I, rows, parts = len(y_I), max(1, BLOCK // (ends_RJ.shape[1] * len(y_I))), []
    for first in range(0, resamples, rows):
        weight_RI = rng.multinomial(I, np.full(I, 1 / I), min(rows, resamples - first)).astype(float)
        tried = [descend(np.tile(end_J, (len(weight_RI), 1)), x_KI, weight_RI, y_I, delta, bounds) for end_J in ends_RJ]
        best_R = np.argmin([left_R for _, left_R in tried], 0)
        parts.append(np.choose(best_R[:, None], [theta_RJ for theta_RJ, _ in tried]))
    return np.concatenate(parts)


def _quantities(law, theta_RJ, mean_K, constant) -> dict[str, np.ndarray]:
    """What is told of a law, _R each, in the signs of its formula: exponents, and logarithms of coefficients."""
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
        G = (np.log(alpha_ / beta_) + A - B) / (alpha_ + beta_)
        grows = beta_ / (alpha_ + beta_)
        return {**floor, "A": A, "B": B, "alpha": alpha, "beta": beta,
                "N_opt coefficient": G - grows * np.log(6), "N_opt exponent": grows,
                "D_opt coefficient": -G - (1 - grows) * np.log(6), "D_opt exponent": 1 - grows}


def _exponent(law, name) -> bool:
    return name in ("alpha", "beta", "gamma", *("b" * (law != "moe"))) or name.endswith("exponent")


def _stretch(freedom: int) -> float:
    return float(special.stdtrit(freedom, 0.975) / special.ndtri(0.975))


def _interval(exponent: bool, value, draws_R, stretch, note="", why="no optimum: an exponent is not positive") -> Quantity:
    """The value, and as far to both sides as the further percentile of resamples, times `stretch`; `why` there is none.
    Coefficients come as logarithms, as they may be more than a float holds. Percentiles alone held the truth of skewed
    exponents (moe's gamma) in 90 of 100 sets, not 95."""
    if not math.isfinite(value):
        return Quantity(math.nan, math.nan, math.nan, why)
    back, lasting_R = float if exponent else np.exp, draws_R[np.isfinite(draws_R)]
    if len(lasting_R) < len(draws_R):
        note = note or f"in {1 - len(lasting_R) / len(draws_R):.1%} of resamples there is none"
    arm = stretch * max(abs(end - value) for end in np.percentile(lasting_R, (2.5, 97.5))) if len(lasting_R) else math.nan
    with np.errstate(over="ignore", under="ignore"):
        value, low, high = (float(back(x)) for x in (value, value - arm, value + arm))
    if exponent and low <= 0 <= high:
        note = note or "the interval holds 0"
    return Quantity(value, low, high, note)


def _held(law, theta_J, bounds, K, constant) -> dict[str, str]:
    """Notes on quantities at a bound of the search."""
    names = {"chinchilla": ("A", "B", "E", "alpha", "beta"), "moe": ("a", "b", "c", "d", "alpha", "beta", "gamma")}.get(
        law, ("a", "E", "b") if constant else ("a", "b"))
    told = {}
    for j, name in enumerate(names):
        if theta_J[j] <= bounds[0, j] + 0.01 or theta_J[j] >= bounds[1, j] - 0.01:
            told[name] = "at the search's bound: 0 fits as well" if K <= j < len(theta_J) - K else "at the search's bound"
    return told


def _notes(runs, law, used_I) -> list[str]:
    notes = []
    if law == "envelope" and runs.params is not None:
        best_I = runs.params[used_I]
        edge = int(((best_I == runs.params.min()) | (best_I == runs.params.max())).sum())
        if edge:
            notes.append(f"at {edge} of {len(best_I)} places of the envelope the best size is the ladder's smallest or largest")
    # 5 %: published FLOPs are rounded, or count attention; it decides a note, no figure
    if law == "chinchilla" and not np.allclose(runs.flops, 6 * runs.params * runs.tokens, rtol=0.05):
        notes.append("FLOPs given are not 6 N D, of which N_opt(C) and D_opt(C) speak")
    return notes


def _isoflop(runs: Runs, tolerance, resamples, rng) -> Fit:
    groups = budgets(runs.flops, tolerance)
    kept = [group for group in groups if len(set(runs.params[group])) >= SIZES]
    if len(kept) < BUDGETS:
        raise ConfigError(f"{runs.label + ': ' if runs.label else ''}{len(kept)} of {len(groups)} compute budgets have {SIZES} "
                          f"sizes: --law isoflop needs {BUDGETS} such budgets (--tolerance {tolerance:g} joins FLOPs)")
    notes = [f"{len(groups) - len(kept)} of {len(groups)} budgets have fewer than {SIZES} sizes and are left out"] * (
        len(kept) < len(groups))
    used_I, fitted_I, pool, shapes = np.zeros(len(runs.loss), bool), np.zeros(len(runs.loss)), [], []
    for group in kept:
        used_I[group] = True
        loss_I = runs.loss[group]
        V_I3, inverse_3I = _parabola(np.log(runs.params[group]))
        fitted_I[group] = V_I3 @ (inverse_3I @ loss_I)
        free_I = np.sqrt(np.maximum(1 - (V_I3 * inverse_3I.T).sum(1), 1e-2))
        pool.append((loss_I - fitted_I[group]) / free_I / loss_I.min())
        shapes.append((V_I3, inverse_3I))
    pool_I = np.concatenate(pool)
    C_G = np.array([np.exp(np.log(runs.flops[group]).mean()) for group in kept])
    full_GI = [runs.loss[group][None] for group in kept]
    drawn_GI = [fitted_I[group] + runs.loss[group].min() * pool_I[rng.integers(0, len(pool_I), (resamples, len(group)))]
                for group in kept]
    freedom, found, least = len(pool_I) - 3 * len(kept), {}, {}
    for name, column in (("N_opt", runs.params), ("D_opt", runs.tokens)):
        values, least[name] = _line(C_G, column, kept, full_GI)
        draws, _ = _line(C_G, column, kept, drawn_GI)
        for part, value, draw_R in zip(("coefficient", "exponent"), values, draws):
            found[f"{name} {part}"] = _interval(part == "exponent", value[0], draw_R, _stretch(freedom),
                                                why="no line: fewer than 2 budgets show a minimum")
    minima = []
    for number, (C, group) in enumerate(zip(C_G, kept)):
        N, D = (float(np.exp(least[name][number][0])) for name in ("N_opt", "D_opt"))
        curve_3 = shapes[number][1] @ runs.loss[group]
        minima.append({"flops": float(C), "N_opt": N, "D_opt": D, "sizes": len(set(runs.params[group])),
                       "loss": float(curve_3[0] - curve_3[1] ** 2 / (4 * curve_3[2])) if math.isfinite(N) else math.nan})
        if not math.isfinite(N):
            notes.append(f"the budget of {C:.3g} FLOPs shows no minimum and is left out")
        elif not runs.params[group].min() <= N <= runs.params[group].max():
            notes.append(f"the minimum of {C:.3g} FLOPs lies outside its sizes")
    return Fit(runs, used_I, fitted_I[used_I], found, notes, minima, tolerance)


def _parabola(x_I) -> tuple[np.ndarray, np.ndarray]:
    """The design of a parabola about the mean of `x_I`, and its pseudo-inverse."""
    V_I3 = np.vander(x_I - x_I.mean(), 3, increasing=True)
    return V_I3, np.linalg.pinv(V_I3)


def _line(C_G, column_I, groups, losses_GRI):
    """(log coefficient_R, exponent_R) of the line through the minima of parabolas in log `column_I`, and log minima_GR: nan
    where there is none, or it lies further outside the runs than they are wide."""
    least_GR = []
    for group, loss_RI in zip(groups, losses_GRI):
        x_I = np.log(column_I[group])
        _, one_R, two_R = _parabola(x_I)[1] @ loss_RI.T
        with np.errstate(divide="ignore", invalid="ignore"):
            least_R = np.where(two_R > 0, -one_R / (2 * two_R), np.nan)
        least_GR.append(np.where(np.abs(least_R) < 1.5 * np.ptp(x_I), least_R + x_I.mean(), np.nan))
    least_GR, x_G = np.array(least_GR), np.log(C_G)
    there_GR = np.isfinite(least_GR)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        count_R = there_GR.sum(0)
        x_R, y_R = (x_G @ there_GR) / count_R, np.where(there_GR, least_GR, 0).sum(0) / count_R
        dx_GR = np.where(there_GR, x_G[:, None] - x_R, 0)
        slope_R = (dx_GR * np.where(there_GR, least_GR - y_R, 0)).sum(0) / (dx_GR ** 2).sum(0)
        return (y_R - slope_R * x_R, slope_R), least_GR


def report(fits: list[Fit], law: str, formula: str, notes: list[str], resamples: int, seed: int) -> dict:
    """All figures, as JSON holds them: null for what is not there."""
    none = lambda value: value if math.isfinite(value) else None
    return {"law": law, "formula": formula, "bootstrap": resamples, "seed": seed, "interval": 0.95, "notes": notes, "fits": [
        {"runs": one.runs.label, "points": int(one.used_I.sum()), "of": len(one.runs.loss), "rms_log_residual": _rms(one),
         "parameters": {name: {"value": none(q.value), "low": none(q.low), "high": none(q.high), "note": q.note}
                        for name, q in one.found.items()},
         "notes": one.notes, **({"minima": [{k: none(v) for k, v in row.items()} for row in one.minima]} if one.minima else {})}
        for one in fits]}


def _rms(one: Fit) -> float:
    return float(np.sqrt(np.mean(_residuals(one) ** 2)))


def _residuals(one: Fit) -> np.ndarray:
    return np.log(one.runs.loss[one.used_I] / one.fitted_I)


def show(found: dict):
    """Prints tables of a report."""
    number = lambda value: "-" if value is None else f"{value:.5g}"
    table = Table("runs", "", "value", "95 % interval", "", title=found["formula"])
    for one in found["fits"]:
        told = f"{one['runs'] or 'all'}: {one['points']}" + f" of {one['of']}" * (one["points"] < one["of"])
        for name, q in one["parameters"].items():
            table.add_row(told, name, number(q["value"]), "-" if q["low"] is None else f"{q['low']:.4g} to {q['high']:.4g}"
                          if q["high"] is not None else f"above {q['low']:.4g}", q["note"])
            told = ""
        table.add_row("", "rms of log residuals", f"{one['rms_log_residual']:.2g}", end_section=True)
    Console().print(table)
    for one in found["fits"]:
        if "minima" in one:
            table = Table("FLOPs", "sizes", "N_opt", "D_opt", "loss", title=f"Minima {one['runs']}".strip())
            for row in one["minima"]:
                table.add_row(*(number(row[key]) for key in ("flops", "sizes", "N_opt", "D_opt", "loss")))
            Console().print(table)
    for note in [*found["notes"], *(f"{one['runs'] + ': ' if one['runs'] else ''}{n}" for one in found["fits"]
                                    for n in one["notes"])]:
        print(note)


def plot(fits: list[Fit], law: str, formula: str, path: Path) -> Path:
    """The fit and its residuals, as a picture at `path`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for number, one in enumerate(fits):
        colour, runs, used_I = f"C{number % 10}", one.runs, one.used_I
        x_I = runs.params if law == "isoflop" else runs.flops
        left.plot(x_I[~used_I], runs.loss[~used_I], ".", color=colour, alpha=0.25)
        left.plot(x_I[used_I], runs.loss[used_I], ".", color=colour, label=runs.label or None)
        if law == "isoflop":
            left.plot([row["N_opt"] for row in one.minima], [row["loss"] for row in one.minima], "k*")
        for group in _curves(one, law):
            left.plot(x_I[used_I][group], one.fitted_I[group], color=colour, linewidth=0.8)
        right.plot(x_I[used_I], 100 * _residuals(one), ".", color=colour)
    right.axhline(0, color="grey", linestyle=":")
    x = "parameters" if law == "isoflop" else "FLOPs"
    left.set(xscale="log", yscale="log", xlabel=x, ylabel="loss", title=formula)
    for set_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        set_formatter(ticker.StrMethodFormatter("{x:g}"))
    right.set(xscale="log", xlabel=x, ylabel="log(loss / fit), %", title="Residuals")
    if any(one.runs.label for one in fits):
        left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _curves(one: Fit, law) -> list[np.ndarray]:
    """Of the runs that were fitted those that a line joins: all, those of a budget, or those of one size."""
    params_I, flops_I = (None if column is None else column[one.used_I] for column in (one.runs.params, one.runs.flops))
    if law == "isoflop":
        return [group[np.argsort(params_I[group])] for group in budgets(flops_I, one.tolerance)]
    sizes_I = np.zeros(len(flops_I)) if law in ("power", "envelope") else params_I
    groups = [np.flatnonzero(sizes_I == size) for size in set(sizes_I)]
    return [group[np.argsort(flops_I[group])] for group in groups]


def run(path: str, law: str, columns: dict, by: list[str], picture: Path, irreducible: bool = False, tolerance: float = 0.2,
        resamples: int = 1000, seed: int = 0) -> tuple[dict, Path]:
    """The report of a file, and where its picture is."""
    if irreducible and law not in ("power", "envelope"):
        raise ConfigError(f"--irreducible goes with --law power and envelope, not {law}")
    for flag, value, wrong in (("tolerance", tolerance, not 0 <= tolerance < math.inf), ("seed", seed, seed < 0),
                               ("bootstrap", resamples, resamples < 40)):
        if wrong:
            raise ConfigError(f"--{flag} {value} is out of range: it is {40 if flag == 'bootstrap' else 0} or more")
    sets, notes = read(path, law, columns, by)
    fits = [fit(runs, law, irreducible, tolerance, resamples, seed) for runs in sets]
    formula = FORMULAS[law].replace("= a", "= E + a") if irreducible else FORMULAS[law]
    return report(fits, law, formula, notes, resamples, seed), plot(fits, law, formula, picture)
