"""Compares arms by the rows of their runs: best learning rates, intervals over seeds, verdicts.

An arm is one variant of an experiment, such as "hybrid" or "softmax", run with several seeds. If it was run with several
learning rates, it is represented by its best one: among the rates with the most seeds, the one with the best mean over seeds.

Two arms are compared seed by seed. The interval of their difference is a bootstrap over seeds: the 2.5th to the 97.5th
percentile of the means of all resamples (of 10,000 resamples for more than six seeds). With three seeds, this is the lowest to
the highest value. A claim states that the first arm is better than the second by more than a bound, or at most a bound worse:

    supports        the whole interval of the difference is above the bound
    contradicts     the whole interval is below the bound
    cannot tell     the bound is inside the interval; or the arms share fewer than three seeds; or no arm is above the floor
                    of the measure; or the first arm should be better and both reach the ceiling
    not run         there are no rows
"""
import collections
import itertools
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx.files import texts

ROOT = Path(__file__).parents[2]
UNIFORM = math.log(256)         # nats per byte if all bytes are equally likely: counts as the loss of a diverged run


class Claim(NamedTuple):
    text: str
    test: str                   # the protocol, with a link to the experiment
    measured: str = ""
    verdict: str = "not run"


class Measure(NamedTuple):
    """The quantity by which two arms are compared."""
    name: str
    lower: bool = False             # lower values are better
    floor: float | None = None      # an arm has learned something if its whole interval is better than this
    ceiling: float | None = None    # an arm has nothing left to learn if its whole interval is better than this
    scale: float = 1.0              # factor for printed values: 100 for percent
    digits: int = 3

    def exceeds(self, found: "Interval", level: float | None) -> bool:
        """Whether the whole interval is better than `level`."""
        return level is not None and (found.high < level if self.lower else found.low > level)


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    seeds: int

    def format(self, scale=1.0, digits=3, unit="", sign="") -> str:
        mean, low, high = (f"{scale * x:{sign}.{digits}f}" for x in self[:3])
        return f"{mean}{unit} ({low} to {high})" if self.seeds else "no number"


class Arm(NamedTuple):
    seeds: dict                 # the row of each seed
    rate: str                   # the learning rate, and which rates were tried


def interval(values) -> Interval:
    """The mean over seeds and its 95 % bootstrap interval."""
    values = np.array(list(values), float)
    n = len(values)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    picks = (np.array(list(itertools.product(range(n), repeat=n))) if n <= 6
             else np.random.default_rng(0).integers(n, size=(10_000, n)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975), method="inverted_cdf")
    return Interval(float(values.mean()), float(low), float(high), n)


def verdict(found: Interval, bound: float = 0.0) -> str:
    if found.seeds < 3:
        return "cannot tell"
    return "supports" if found.low > bound else "contradicts" if found.high < bound else "cannot tell"


def compare(claim: Claim, measure: Measure, pair: dict[str, tuple[Arm | None, Callable | str]], bound: float = 0.0) -> Claim:
    """Fills in a claim that the first of two arms is better than the second by more than `bound`.

    Args:
      pair: {name: (arm, value)}; `value` is a function of a row or the name of one of its fields.
      bound: if negative, the claim is that the first arm is worse by less than that.
    Returns:
      the claim with its measured values and its verdict. The difference uses the seeds that both arms have.
    """
    test = claim.test + format_rates({name: arm for name, (arm, _) in pair.items() if arm})
    limit = measure.scale * (-bound if measure.lower else bound)
    unit = " percentage points" if bound and measure.scale == 100 else ""
    test += f"; claim: difference {'below' if measure.lower else 'above'} {limit or 0:{'+' if limit else ''}g}{unit}"
    if not all(arm for arm, _ in pair.values()):
        return claim._replace(test=test)
    values = {name: values_by_seed(arm, value if callable(value) else operator.itemgetter(value))
              for name, (arm, value) in pair.items()}
    common = sorted(set.intersection(*map(set, values.values())))
    intervals = {name: interval(by_seed[seed] for seed in common or by_seed) for name, by_seed in values.items()}
    first, second = values.values()
    difference = interval(first[seed] - second[seed] for seed in common)
    gain = interval(second[seed] - first[seed] for seed in common) if measure.lower else difference
    word = verdict(gain, bound)
    measured = f"{measure.name}: " + ", ".join(
        f"{name} {found.format(measure.scale, measure.digits)}" for name, found in intervals.items())
    measured += f"; difference {difference.format(measure.scale, measure.digits, sign='+')}"
    if measure.floor is not None and not any(measure.exceeds(found, measure.floor) for found in intervals.values()):
        return Claim(claim.text, test, measured + "; neither is above the floor", "cannot tell")
    if all(measure.exceeds(found, measure.ceiling) for found in intervals.values()):
        return Claim(claim.text, test, measured + "; both reach the ceiling", word if bound < 0 else "cannot tell")
    return Claim(claim.text, test, measured, word)


def values_by_seed(arm: Arm | None, value: Callable) -> dict:
    """{seed: value(row)} of the seeds whose value is finite."""
    found = {seed: value(row) for seed, row in arm.seeds.items()} if arm else {}
    return {seed: number for seed, number in found.items() if math.isfinite(number)}


def format_rates(named: dict[str, Arm]) -> str:
    """The learning rates of arms, as the end of a test's description; stated once if they are the same."""
    found = {name: arm.rate for name, arm in named.items() if arm.rate}
    if len(set(found.values())) == 1:
        return f"; learning rate {next(iter(found.values()))}"
    return "; learning rates: " + ", ".join(f"{name} {rate}" for name, rate in found.items()) if found else ""


def read_rows(name: str) -> list[dict]:
    path = ROOT / "experiments" / "results" / f"{name}.jsonl"
    return [row for _, row in texts.read_json_lines(path)] if path.exists() else []


def best_arms(rows: list[dict], fields: tuple, score: Callable) -> dict[tuple, Arm]:
    """Groups rows into arms by the values of `fields`; each arm has the learning rate with the highest mean score.

    Only the learning rates with the most seeds are considered.
    """
    by_rate = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in rows:
        by_rate[tuple(row[name] for name in fields)][row["lr"]][row["seed"]] = row
    best = {arm: max(tried, key=lambda lr: (len(tried[lr]), np.mean([score(row) for row in tried[lr].values()])))
            for arm, tried in by_rate.items()}
    return {arm: Arm(tried[best[arm]], _format_rate(best[arm], tried)) for arm, tried in by_rate.items()}


def _format_rate(best: float, tried) -> str:
    rates = ", ".join(f"{lr:g}" for lr in sorted(tried))
    return f"{best:g} (tried: {rates})" if len(tried) > 1 else f"{best:g} (no other tried)"


def arms_at_one_rate(rows: list[dict], *fields: str, rate: str = "") -> dict[tuple, Arm]:
    """Groups rows without a learning rate into arms by the values of `fields`."""
    by_arm = collections.defaultdict(dict)
    for row in rows:
        by_arm[tuple(row[name] for name in fields)][row["seed"]] = row
    return {arm: Arm(seeds, rate) for arm, seeds in by_arm.items()}


def loss(row: dict) -> float:
    """The row's loss in nats; UNIFORM for a run that diverged."""
    found = row["loss"]
    return found if found is not None and math.isfinite(found) else UNIFORM


def negative_loss(row: dict) -> float:
    return -loss(row)
