"""Counts how often the 95 % intervals of `mmx fit` contain the true exponents, and times the fits.

    python experiments/measure/fit_coverage.py                        # 100 sets of runs for each law, 1,000 resamples
    python experiments/measure/fit_coverage.py --law moe --resamples 200      # 6 minutes

Each set has the losses of a known law times log-normal noise, seeded by the number of the set. Noise of the kind
"uneven" is four times as large for small models as for large ones. With "outliers", 3 % of the runs have a loss that is a
tenth higher.
"""
import argparse
import time
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from mmx.analysis.runs import Runs
from mmx.analysis.scaling import fit


class Case(NamedTuple):
    law: str
    name: str
    runs: Runs                  # without noise
    truth: dict[str, float]     # true exponents
    noise: float = 0.005        # standard deviation of log loss
    kind: str = ""              # of noise
    irreducible: bool = False


def grid(*axes):
    return [axis.ravel() for axis in np.meshgrid(*axes)]


def power(E, a, b, count, low=1e17, high=1e21) -> Runs:
    """Runs of L(C) = E + a C^-b."""
    C_I = np.geomspace(low, high, count)
    return Runs("", None, None, C_I, E + a * C_I ** -b)


def chinchilla(law, N_I, D_I) -> Runs:
    """Runs of L(N, D) = E + A / N^alpha + B / D^beta."""
    E, A, B, alpha, beta = law
    return Runs("", N_I, D_I, 6 * N_I * D_I, E + A * N_I ** -alpha + B * D_I ** -beta)


def isoflop(law, flops, count) -> Runs:
    """Runs of `count` sizes for each budget, from an eighth of the optimal size to eight times that size."""
    _, A, B, alpha, beta = law
    C_G = np.array(flops)
    best_G = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C_G / 6) ** (beta / (alpha + beta))
    N_I, C_I = (part.ravel() for part in np.broadcast_arrays(best_G[:, None] * np.geomspace(1 / 8, 8, count), C_G[:, None]))
    return chinchilla(law, N_I, C_I / (6 * N_I))


def experts(N_I, D_I) -> Runs:
    """Runs of the law "moe"."""
    return Runs("", N_I, D_I, 6 * N_I * D_I, 1.5 + 900 * N_I ** -0.4 + 2e3 * D_I ** -0.35 + 60 * (N_I * D_I) ** -0.12)


PUBLISHED, TINY = (1.69, 406.4, 410.7, 0.34, 0.28), (1.2, 8.0, 40.0, 0.25, 0.28)       # E, A, B, alpha, beta
EXPONENTS = {"alpha": 0.34, "beta": 0.28, "N_opt exponent": 28 / 62, "D_opt exponent": 34 / 62}     # of PUBLISHED
OPTIMA = {name: EXPONENTS[name] for name in ("N_opt exponent", "D_opt exponent")}
NINE_BUDGETS, FOUR_BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21), (1e18, 1e19, 1e20, 1e21)
CURVES = grid(np.geomspace(1e5, 1e10, 21), np.geomspace(1e16, 1e21, 41))    # sizes, and FLOPs along their training curves
LARGE = grid(np.geomspace(1e7, 1e10, 20), np.geomspace(1e9, 3e11, 10))      # parameters and tokens
SMALL = grid(np.geomspace(2.5e4, 4e5, 5), np.geomspace(1e6, 3e7, 5))
ACTIVATED = grid(np.geomspace(4.4e7, 1.2e9, 20), np.geomspace(5e9, 5e11, 10))
NO_CONSTANT = (0.0, 30.0, 60.0, 0.16, 0.12)         # without E, the lower envelope is a power law
CASES = [
    Case("power", "7 runs", power(0, 30, 0.05, 7), {"b": 0.05}),
    Case("power", "40 runs, outliers", power(0, 30, 0.05, 40), {"b": 0.05}, kind="outliers"),
    Case("power", "10 runs, with E", power(1.7, 2e3, 0.16, 10), {"b": 0.16}, irreducible=True),
    Case("power", "200 runs, with E", power(1.7, 2e3, 0.16, 200), {"b": 0.16}, irreducible=True),
    Case("envelope", "21 training curves", chinchilla(NO_CONSTANT, CURVES[0], CURVES[1] / (6 * CURVES[0])), {
        "b": 0.16 * 0.12 / 0.28}, noise=0.002),
    Case("chinchilla", "200 runs", chinchilla(PUBLISHED, *LARGE), EXPONENTS),
    Case("chinchilla", "200 runs, uneven", chinchilla(PUBLISHED, *LARGE), EXPONENTS, kind="uneven"),
    Case("chinchilla", "200 runs, outliers", chinchilla(PUBLISHED, *LARGE), EXPONENTS, kind="outliers"),
    Case("chinchilla", "25 runs of 25 k to 400 k", chinchilla(TINY, *SMALL), {
        "alpha": 0.25, "beta": 0.28, "N_opt exponent": 28 / 53, "D_opt exponent": 25 / 53}),
    Case("isoflop", "9 budgets of 9 sizes", isoflop(PUBLISHED, NINE_BUDGETS, 9), OPTIMA),
    Case("isoflop", "4 budgets of 6 sizes, uneven", isoflop(PUBLISHED, FOUR_BUDGETS, 6), OPTIMA, kind="uneven"),
    Case("moe", "200 runs", experts(*ACTIVATED), {"alpha": -0.4, "beta": -0.35, "gamma": -0.12}, noise=0.002),
]


def add_noise(case: Case, rng) -> Runs:
    runs = case.runs
    scale = case.noise * np.ones(len(runs.loss))
    if case.kind == "uneven":
        small_I = np.log(runs.params.max() / runs.params) / np.log(np.ptp(runs.params) / runs.params.min() + 1)
        scale = scale * 4 ** small_I / 2
    shift_I = 0.1 * (rng.random(len(runs.loss)) < 0.03) if case.kind == "outliers" else 0
    return runs._replace(loss=runs.loss * np.exp(scale * rng.standard_normal(len(runs.loss)) + shift_I))


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--sets", type=int, default=100, help="sets of runs for each case (default 100)")
    flags.add_argument("--resamples", type=int, default=1000, help="resamples of each set (default 1000)")
    flags.add_argument("--law", help="only the cases of this law (default: all)")
    args = flags.parse_args()
    table = Table("law", "runs", "median seconds per fit", "exponent", "true value",
                  f"intervals that contain it, of {args.sets}", "median width",
                  title=f"95 % intervals from {args.resamples:,} resamples")
    for case in (case for case in CASES if args.law in (None, case.law)):
        fits, seconds = [], []
        for seed in range(args.sets):
            runs, start = add_noise(case, np.random.default_rng(seed)), time.perf_counter()
            fits.append(fit(runs, case.law, case.irreducible, resamples=args.resamples, seed=seed).quantities)
            seconds.append(time.perf_counter() - start)
        for number, (name, truth) in enumerate(case.truth.items()):
            count = sum(one[name].low <= truth <= one[name].high for one in fits)
            width = np.median([one[name].high - one[name].low for one in fits])
            first = (case.law, case.name, f"{np.median(seconds):.2f}") if not number else ("", "", "")
            table.add_row(*first, name, f"{truth:.4f}", str(count), f"{width:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
