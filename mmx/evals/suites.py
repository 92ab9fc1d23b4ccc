"""The suites by name: what a run plans, how an answer is scored, what a cell of the table says."""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from mmx.evals import longbench, mqar, mr_niah, mtob, needle, position, ruler, vision
from mmx.evals.examples import Ask, Task, grid, match_all


class Suite(NamedTuple):
    title: str
    rows: str           # what a row of the table is
    plan: Callable[[Ask], Iterable[Task]]
    score: Callable     # (output, example) -> a number, or one by row
    cell: Callable[[list[dict]], float] = lambda records: float(np.mean([record["score"] for record in records]))
    unit: str = "accuracy"
    data: bool = False  # whether it reads files of the user
    learned: bool = True    # whether examples of it may be trained on
    chance: Callable[[], dict] | None = None    # by row, a last column: then the first alone is the score
    picture: Callable | None = None     # (table, its path) -> the path, in place of the heat map


SUITES = {
    "needle": Suite("Needle in a haystack", "depth %", needle.plan, match_all),
    "ruler": Suite("RULER", "task", ruler.plan, ruler.score, data=True),
    "mr-niah": Suite("MR-NIAH", "depth %", mr_niah.plan, mr_niah.score, data=True),
    "mqar": Suite("MQAR", "pairs", grid(mqar.example, (512, 1024), mqar.PAIRS, 20, 10**6), mqar.score),
    "mtob": Suite("MTOB", "direction", mtob.plan, mtob.score, mtob.chrf, "chrF", data=True, learned=False),
    "longbench2": Suite("LongBench v2", "difficulty", longbench.plan, longbench.score, data=True, learned=False),
    "position": Suite("Running text by position", "position", grid(position.example, (1024, 4096), ("all",), 10),
                      position.score, position.perplexity, "perplexity"),
    "vision": Suite("Held-out pictures", "question", vision.plan, vision.score, learned=False, chance=vision.chance,
                    picture=vision.contact),
}
