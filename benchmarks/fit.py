"""How often the 95 % intervals of `mmx fit` hold the truth, and how long a grid of 200 runs takes.

    python benchmarks/fit.py                        # 100 sets a row, 1,000 resamples
    python benchmarks/fit.py --law moe --resamples 200      # 6 minutes

Each set is planted: exact losses of the law times log-normal noise of the same seed's own. `uneven` noise is four times as
large for small models as for large ones; `outliers` are 3 % of runs, up by a tenth.
"""
import argparse
import time
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from mmx.analysis.scaling import Runs, fit


class Case(NamedTuple):
    law: str
    name: str
    runs: Runs                  # without noise
    truth: dict[str, float]     # of each exponent
    noise: float = 0.005
    kind: str = ""              # of noise
    irreducible: bool = False


def grid(*axes):
    return [axis.ravel() for axis in np.meshgrid(*axes)]


def power(E, a, b, count, low=1e17, high=1e21) -> Runs:
    C_I = np.geomspace(low, high, count)
    return Runs("", None, None, C_I, E + a * C_I ** -b)


def surface(law, N_I, D_I) -> Runs:
    E, A, B, alpha, beta = law
    return Runs("", N_I, D_I, 6 * N_I * D_I, E + A * N_I ** -alpha + B * D_I ** -beta)


def isoflop(law, flops, count) -> Runs:
    """Sizes from an eighth to eight times the best of each budget."""
    _, A, B, alpha, beta = law
    C_G = np.array(flops)
    best_G = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C_G / 6) ** (beta / (alpha + beta))
    N_I, C_I = (part.ravel() for part in np.broadcast_arrays(best_G[:, None] * np.geomspace(1 / 8, 8, count), C_G[:, None]))
    return surface(law, N_I, C_I / (6 * N_I))


def experts(N_I, D_I) -> Runs:
    return Runs("", N_I, D_I, 6 * N_I * D_I, 1.5 + 900 * N_I ** -0.4 + 2e3 * D_I ** -0.35 + 60 * (N_I * D_I) ** -0.12)


CHINCHILLA, TINY = (1.69, 406.4, 410.7, 0.34, 0.28), (1.2, 8.0, 40.0, 0.25, 0.28)
BY = {"alpha": 0.34, "beta": 0.28, "N_opt exponent": 28 / 62, "D_opt exponent": 34 / 62}
BUDGETS, FEW = (6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21), (1e18, 1e19, 1e20, 1e21)
LADDER = grid(np.geomspace(1e5, 1e10, 21), np.geomspace(1e16, 1e21, 41))     # sizes, and the FLOPs of their training curves
LARGE = grid(np.geomspace(1e7, 1e10, 20), np.geomspace(1e9, 3e11, 10))
SMALL = grid(np.geomspace(2.5e4, 4e5, 5), np.geomspace(1e6, 3e7, 5))
ACTIVE = grid(np.geomspace(4.4e7, 1.2e9, 20), np.geomspace(5e9, 5e11, 10))
FREE = (0.0, 30.0, 60.0, 0.16, 0.12)          # a surface without a constant: its envelope is a power law
CASES = [
    Case("power", "7 runs", power(0, 30, 0.05, 7), {"b": 0.05}),
    Case("power", "40 runs, outliers", power(0, 30, 0.05, 40), {"b": 0.05}, kind="outliers"),
    Case("power", "10 runs, with E", power(1.7, 2e3, 0.16, 10), {"b": 0.16}, irreducible=True),
    Case("power", "200 runs, with E", power(1.7, 2e3, 0.16, 200), {"b": 0.16}, irreducible=True),
    Case("envelope", "21 training curves", surface(FREE, LADDER[0], LADDER[1] / (6 * LADDER[0])), {
        "b": 0.16 * 0.12 / 0.28}, noise=0.002),
    Case("chinchilla", "200 runs", surface(CHINCHILLA, *LARGE), BY),
    Case("chinchilla", "200 runs, uneven", surface(CHINCHILLA, *LARGE), BY, kind="uneven"),
    Case("chinchilla", "200 runs, outliers", surface(CHINCHILLA, *LARGE), BY, kind="outliers"),
    Case("chinchilla", "25 runs of 25 k to 400 k", surface(TINY, *SMALL), {
        "alpha": 0.25, "beta": 0.28, "N_opt exponent": 28 / 53, "D_opt exponent": 25 / 53}),
    Case("isoflop", "9 budgets of 9", isoflop(CHINCHILLA, BUDGETS, 9), dict(list(BY.items())[2:])),
    Case("isoflop", "4 budgets of 6, uneven", isoflop(CHINCHILLA, FEW, 6), dict(list(BY.items())[2:]), kind="uneven"),
    Case("moe", "200 runs", experts(*ACTIVE), {"alpha": -0.4, "beta": -0.35, "gamma": -0.12}, noise=0.002),
]


def noisy(case: Case, rng) -> Runs:
    runs = case.runs
    scale = case.noise * np.ones(len(runs.loss))
    if case.kind == "uneven":
        small_I = np.log(runs.params.max() / runs.params) / np.log(np.ptp(runs.params) / runs.params.min() + 1)
        scale = scale * 4 ** small_I / 2
    off_I = 0.1 * (rng.random(len(runs.loss)) < 0.03) if case.kind == "outliers" else 0
    return runs._replace(loss=runs.loss * np.exp(scale * rng.standard_normal(len(runs.loss)) + off_I))


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--sets", type=int, default=100, help="a row (default 100)")
    flags.add_argument("--resamples", type=int, default=1000, help="a set (default 1000)")
    flags.add_argument("--law", help="this alone")
    args = flags.parse_args()
    table = Table("law", "", "exponent", "truth", f"held, of {args.sets}", "median interval's width", "s a fit",
                  title=f"95 % intervals of {args.resamples:,} resamples")
    for case in (case for case in CASES if args.law in (None, case.law)):
        found, seconds = [], []
        for seed in range(args.sets):
            runs, start = noisy(case, np.random.default_rng(seed)), time.perf_counter()
            found.append(fit(runs, case.law, case.irreducible, resamples=args.resamples, seed=seed).found)
            seconds.append(time.perf_counter() - start)
        for number, (name, truth) in enumerate(case.truth.items()):
            held = sum(one[name].low <= truth <= one[name].high for one in found)
            width = np.median([one[name].high - one[name].low for one in found])
            table.add_row(*((case.law, case.name) if not number else ("", "")), name, f"{truth:.4f}", str(held), f"{width:.4f}",
                          f"{np.median(seconds):.2f}" * (not number))
    Console().print(table)


if __name__ == "__main__":
    main()
