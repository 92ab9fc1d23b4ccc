"""What rows say of a claim: arms at their best rate, intervals over seeds, and the rule of the verdicts.

A difference is taken seed by seed, and its interval is a bootstrap over seeds: the 2.5th to the 97.5th percentile of the means
of all resamples (of more than six seeds, of 10,000). Of three seeds that is the lowest to the highest. Where an arm has several
learning rates it is told at its best: of those with the most seeds, the one with the best mean over seeds. A claim says of two
arms that the first has more of something, or less, by a bound:

    supports        the whole interval of the difference is beyond it
    contradicts     the whole interval is short of it
    cannot tell     the bound is within the interval; there are fewer than three seeds in common; neither arm has any for
                    certain of what is measured or, where one should have more of it, both have all
    not run         there are no rows
"""
import collections
import itertools
import json
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
UNIFORM = math.log(256)         # nats of a byte that is not known at all: the loss of a run that diverged


class Claim(NamedTuple):
    text: str
    test: str                   # what was done, with a link
    measured: str = ""
    verdict: str = "not run"


class Measure(NamedTuple):
    """What two arms are compared by."""
    name: str
    lower: bool = False             # less of it is better
    nothing: float | None = None    # an arm that is not wholly beyond this has learned nothing
    all: float | None = None        # an arm that is wholly beyond this has no more to learn
    scale: float = 1.0
    digits: int = 3

    def beyond(self, found: "Interval", least: float | None) -> bool:
        return least is not None and (found.high < least if self.lower else found.low > least)


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    seeds: int

    def told(self, scale=1.0, digits=3, unit="", sign="") -> str:
        mean, low, high = (f"{scale * x:{sign}.{digits}f}" for x in self[:3])
        return f"{mean}{unit} ({low} to {high})" if self.seeds else "no number"


class Arm(NamedTuple):
    seeds: dict                 # the row of each seed
    rate: str                   # the learning rate, and of which


def interval(values) -> Interval:
    """The mean over seeds, and where 95 % of the resamples' means are."""
    values = np.array(list(values), float)
    n = len(values)
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    picks = (np.array(list(itertools.product(range(n), repeat=n))) if n <= 6
             else np.random.default_rng(0).integers(n, size=(10_000, n)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975), method="inverted_cdf")
    return Interval(float(values.mean()), float(low), float(high), n)


def verdict(found: Interval, above: float = 0.0) -> str:
    if found.seeds < 3:
        return "cannot tell"
    return "supports" if found.low > above else "contradicts" if found.high < above else "cannot tell"


def compared(claim: Claim, measure: Measure, pair: dict[str, tuple[Arm | None, Callable | str]], bound: float = 0.0) -> Claim:
    """The claim that of two arms, {name: (arm, a row's value, or its name)}, the first is better by over `bound`.

    A bound below 0: it is as good, but for that. Seeds count that both have.
    """
    test = claim.test + rates({name: arm for name, (arm, _) in pair.items() if arm})
    words = "less" if (bound < 0) != measure.lower else "more"
    test += f"; {abs(measure.scale * bound):g} {words} is none" * bool(bound)
    if not all(arm for arm, _ in pair.values()):
        return claim._replace(test=test)
    values = {name: over(arm, value if callable(value) else operator.itemgetter(value)) for name, (arm, value) in pair.items()}
    common = sorted(set.intersection(*map(set, values.values())))
    own = {name: interval(of[seed] for seed in common or of) for name, of in values.items()}
    one, other = values.values()
    more = interval(one[seed] - other[seed] for seed in common)
    measured = f"{measure.name}: " + ", ".join(
        f"{name} {found.told(measure.scale, measure.digits)}" for name, found in own.items())
    measured += f": {more.told(measure.scale, measure.digits, sign='+')}"
    word = verdict(interval(other[seed] - one[seed] for seed in common) if measure.lower else more, bound)
    if measure.nothing is not None and not any(measure.beyond(found, measure.nothing) for found in own.values()):
        return Claim(claim.text, test, measured + "; neither has any for certain", "cannot tell")
    if all(measure.beyond(found, measure.all) for found in own.values()):
        return Claim(claim.text, test, measured + "; both have all of it", word if bound < 0 else "cannot tell")
    return Claim(claim.text, test, measured, word)


def over(arm: Arm | None, value) -> dict:
    """A number for each seed that has one."""
    found = {seed: value(row) for seed, row in arm.seeds.items()} if arm else {}
    return {seed: number for seed, number in found.items() if math.isfinite(number)}


def rates(named: dict[str, Arm]) -> str:
    """For a test's words: the learning rates of arms, once where they are the same."""
    told = {name: arm.rate for name, arm in named.items() if arm.rate}
    if len(set(told.values())) == 1:
        return f"; rate {next(iter(told.values()))}"
    return "; rates: " + ", ".join(f"{name} {rate}" for name, rate in told.items()) if told else ""


def rows(name: str) -> list[dict]:
    path = ROOT / "experiments" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def arms(found: list[dict], names: tuple, score) -> dict[tuple, Arm]:
    """Each arm, by its values of `names`, at the learning rate whose mean of `score` is highest among those with most seeds."""
    by_rate = collections.defaultdict(lambda: collections.defaultdict(dict))
    for row in found:
        by_rate[tuple(row[name] for name in names)][row["lr"]][row["seed"]] = row
    best = {arm: max(tried, key=lambda lr: (len(tried[lr]), np.mean([score(row) for row in tried[lr].values()])))
            for arm, tried in by_rate.items()}
    return {arm: Arm(tried[best[arm]], _rate(best[arm], tried)) for arm, tried in by_rate.items()}


def _rate(best: float, tried) -> str:
    return f"{best:g} of " + ", ".join(f"{lr:g}" for lr in sorted(tried)) if len(tried) > 1 else f"{best:g} alone"


def fixed(found: list[dict], *names: str, rate: str = "") -> dict[tuple, Arm]:
    """Arms whose rows tell no learning rate."""
    by_arm = collections.defaultdict(dict)
    for row in found:
        by_arm[tuple(row[name] for name in names)][row["seed"]] = row
    return {arm: Arm(seeds, rate) for arm, seeds in by_arm.items()}


def loss(row: dict) -> float:
    """Nats; a run that diverged knows nothing."""
    found = row["loss"]
    return found if found is not None and math.isfinite(found) else UNIFORM


def minus_loss(row: dict) -> float:
    return -loss(row)
