"""The suites by name: how each one plans its examples, scores an output, and aggregates the scores of a table's cell."""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from mmx.evals import longbench, mqar, mr_niah, mtob, needle, position, ruler, vision
from mmx.evals.examples import PlannedExample, SuiteOptions, grid_plan, match_all


class Suite(NamedTuple):
    title: str
    rows: str           # heading of the table's rows
    plan: Callable[[SuiteOptions], Iterable[PlannedExample]]
    score: Callable     # (output, example) -> a number, or a dict with one for each row
    aggregate: Callable[[list[dict]], float] = lambda records: float(np.mean([record["score"] for record in records]))
    unit: str = "accuracy"
    data: bool = False  # whether it reads the user's files
    trainable: bool = True      # whether `mmx examples` may write its examples as training data
    chance: Callable[[], dict] | None = None    # chance level of each row, a last column. Then only the first column is scored
    plot: Callable | None = None        # (result, path) -> path; replaces the heat map


SUITES = {
    "needle": Suite("Needle in a haystack", "depth (%)", needle.plan, match_all),
    "ruler": Suite("RULER", "task", ruler.plan, ruler.score, data=True),
    "mr-niah": Suite("MR-NIAH", "depth (%)", mr_niah.plan, mr_niah.score, data=True),
    "mqar": Suite("MQAR", "pairs", grid_plan(mqar.example, (512, 1024), mqar.PAIRS, 20, 10**6), mqar.score),
    "mtob": Suite("MTOB", "direction", mtob.plan, mtob.score, mtob.chrf, "chrF", data=True, trainable=False),
    "longbench2": Suite("LongBench v2", "difficulty", longbench.plan, longbench.score, data=True, trainable=False),
    "position": Suite("Running text by position", "position", grid_plan(position.example, (1024, 4096), ("all",), 10),
                      position.score, position.perplexity, "perplexity"),
    "vision": Suite("Held-out images", "question", vision.plan, vision.score, trainable=False, chance=vision.chance,
                    plot=vision.plot_answers),
}
