"""Questions about generated pictures: combinations and words that no training picture has (`mmx.data.scenes`).

Asked twice, with the picture and blind, its ground bare. An answer is right that is the truth's every character; of a word
that is read the score is the share of places, of the longer of answer and truth, that have the same letter.
"""
import functools
import json
import statistics
from collections import Counter
from pathlib import Path

from mmx.config import ConfigError
from mmx.data import scenes
from mmx.data.images import read
from mmx.evals.examples import Ask, Example, Task, check_rows, draws

ROWS = tuple(scenes.QUESTIONS)
SEEN, BLIND = "picture", "blind"
PART = "test"
STEPS = 16              # of an answer; the longest has 10 bytes


def plan(ask: Ask):
    if not (ask.vision and ask.vision.layers):
        raise ConfigError("vision: this checkpoint reads text alone; one with images has model.vision.layers above 0")
    if ask.lengths:
        raise ConfigError("vision has questions of their own lengths: leave --lengths out")
    check_rows(ask.rows, ROWS)
    for column in (SEEN, BLIND):
        for row in ask.rows or ROWS:
            names = [name for name, _ in _documents(row)]
            if ask.examples > len(names):
                raise ConfigError(f"vision has {len(names)} questions of row {row}: --examples {ask.examples} is more")
            order = draws("vision", row, ask.seed).permutation(len(names))
            for index in range(ask.examples or 200):
                yield Task(row, column, index, functools.partial(example, names[order[index]], column))


@functools.cache
def _documents(row: str) -> list:
    source = "words" if row == "word" else "scenes"
    return [(name, content) for name, content in scenes.documents(source, PART) if name.startswith(f"{row}/")]


def example(name: str, column: str) -> Example:
    row = name.split("/")[0]
    asked = dict(_documents(row))[name]
    return Example(asked.prompt.decode(), (asked.completion.decode().strip(),), STEPS, meta={"name": name},
                   images=asked.images if column == SEEN else (scenes.Blank(),))


def score(output: str, example: Example) -> float:
    said, [truth] = output.strip(), example.answers
    return alike(said, truth) if example.meta["name"].startswith("word/") else float(said == truth)


def alike(said: str, truth: str) -> float:
    return sum(a == b for a, b in zip(said, truth)) / max(len(said), len(truth))


def chance() -> dict[str, float]:
    """By row, what one answer to all gets: of words the commonest letter at each place, and of these as many as do best."""
    letters = [Counter(word[n] for word in scenes.words("train") if len(word) > n).most_common(1)[0][0]
               for n in range(scenes.MAX_LETTERS)]
    words = scenes.words(PART)
    best = max(statistics.mean(alike("".join(letters[:n]), word) for word in words) for n in range(1, scenes.MAX_LETTERS + 1))
    return scenes.CHANCE | {"word": best}


def contact(result: dict, path: Path) -> Path:
    """Pictures with their questions and answers, beside wrong ones the truth, eight of each row; from the lines beside PATH."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    rows, across = list(result["scores"]), 8
    figure, axes = pyplot.subplots(len(rows), across, figsize=(1.6 * across, 2.15 * len(rows)), layout="constrained",
                                   squeeze=False)
    for row, line in zip(rows, axes):
        asked = [r for r in lines if (r["row"], r["column"]) == (row, SEEN)][:across]
        for place in line:
            place.axis("off")
        for place, record in zip(line, asked):
            document, [truth] = dict(_documents(row))[record["name"]], record["answers"]
            said = record["output"].strip() or "(nothing)"
            question = document.prompt.decode().partition(">")[2]
            place.imshow(read(*document.images))
            place.set_title(_wrapped(question), fontsize=7)
            right = said == truth
            place.text(0.5, -0.04, said if right else f"{said}, not {truth}", transform=place.transAxes, ha="center", va="top",
                       fontsize=9, color="green" if right else "crimson")
    cells = result["scores"]
    figure.suptitle("held out, right with the picture / blind: " + ", ".join(
        f"{row} {100 * cells[row][SEEN]:.0f} / {100 * cells[row][BLIND]:.0f} %" for row in rows), fontsize=9)
    figure.savefig(path, dpi=85)
    pyplot.close(figure)
    return path


def _wrapped(question: str) -> str:
    """In two lines."""
    words = question.split()
    return " ".join(words[:len(words) // 2]) + "\n" + " ".join(words[len(words) // 2:])
