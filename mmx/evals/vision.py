"""Questions about generated images, with combinations and words that no training image has (`mmx.data.scenes`).

Each question is asked twice: with its image, and blind, with an image of the background only. An answer is right if it is equal
to the truth. For a word, the score is the number of positions with the right letter, divided by the length of the answer or of
the truth, whichever is longer.
"""
import functools
import statistics
from collections import Counter
from pathlib import Path

from mmx.config import ConfigError
from mmx.data import scenes
from mmx.data.images import read
from mmx.evals.examples import Example, PlannedExample, SuiteOptions, check_rows, make_rng
from mmx.files import texts

ROWS = tuple(scenes.QUESTIONS)
WITH_IMAGE, BLIND = "picture", "blind"      # columns
SPLIT = "test"
STEPS = 16              # tokens generated for an answer; the longest answer has 10 bytes


def plan(options: SuiteOptions):
    if not (options.vision and options.vision.layers):
        raise ConfigError("vision: this checkpoint reads only text; the suite needs one with model.vision.layers above 0")
    if options.lengths:
        raise ConfigError("vision has questions of fixed lengths: leave --lengths out")
    check_rows(options.rows, ROWS)
    for column in (WITH_IMAGE, BLIND):
        for row in options.rows or ROWS:
            names = [name for name, _ in _documents(row)]
            if options.examples > len(names):
                raise ConfigError(f"vision has only {len(names)} questions in row {row}: lower --examples {options.examples}")
            order = make_rng("vision", row, options.seed).permutation(len(names))
            for index in range(options.examples or 200):
                yield PlannedExample(row, column, index, functools.partial(example, names[order[index]], column))


@functools.cache
def _documents(row: str) -> list:
    source = "words" if row == "word" else "scenes"
    return [(name, content) for name, content in scenes.documents(source, SPLIT) if name.startswith(f"{row}/")]


def example(name: str, column: str) -> Example:
    row = name.split("/")[0]
    document = dict(_documents(row))[name]
    return Example(document.prompt.decode(), (document.completion.decode().strip(),), STEPS, meta={"name": name},
                   images=document.images if column == WITH_IMAGE else (scenes.Blank(),))


def score(output: str, example: Example) -> float:
    answer, [truth] = output.strip(), example.answers
    return letter_accuracy(answer, truth) if example.meta["name"].startswith("word/") else float(answer == truth)


def letter_accuracy(answer: str, truth: str) -> float:
    return sum(a == b for a, b in zip(answer, truth)) / max(len(answer), len(truth))


def chance() -> dict[str, float]:
    """Chance level: the score of giving the same answer to every question, by row of the table.

    For words, the answer is the commonest letter at each position, with the length that scores best.
    """
    letters = [Counter(word[n] for word in scenes.words("train") if len(word) > n).most_common(1)[0][0]
               for n in range(scenes.MAX_LETTERS)]
    words = scenes.words(SPLIT)
    best = max(statistics.mean(letter_accuracy("".join(letters[:n]), word) for word in words)
               for n in range(1, scenes.MAX_LETTERS + 1))
    return scenes.CHANCE | {"word": best}


def plot_answers(result: dict, path: Path) -> Path:
    """Plots eight images of each row with questions and answers, and the truth if an answer is wrong.

    Reads the examples from the .jsonl file next to `path`.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [record for _, record in texts.read_json_lines(path.with_suffix(".jsonl"))[1:]]
    rows, columns = list(result["scores"]), 8
    figure, axes = pyplot.subplots(len(rows), columns, figsize=(1.6 * columns, 2.15 * len(rows)), layout="constrained",
                                   squeeze=False)
    for row, row_axes in zip(rows, axes):
        records = [r for r in lines if (r["row"], r["column"]) == (row, WITH_IMAGE)][:columns]
        for axis in row_axes:
            axis.axis("off")
        for axis, record in zip(row_axes, records):
            document, [truth] = dict(_documents(row))[record["name"]], record["answers"]
            answer = record["output"].strip() or "(nothing)"
            question = document.prompt.decode().partition(">")[2]
            axis.imshow(read(*document.images))
            axis.set_title(_wrap(question), fontsize=7)
            right = answer == truth
            axis.text(0.5, -0.04, answer if right else f"{answer}, not {truth}", transform=axis.transAxes, ha="center",
                      va="top", fontsize=9, color="green" if right else "crimson")
    cells = result["scores"]
    figure.suptitle("held-out questions, score with the image / blind: " + ", ".join(
        f"{row} {100 * cells[row][WITH_IMAGE]:.0f} / {100 * cells[row][BLIND]:.0f} %" for row in rows), fontsize=9)
    figure.savefig(path, dpi=85)
    pyplot.close(figure)
    return path


def _wrap(question: str) -> str:
    """The question in two lines."""
    words = question.split()
    return " ".join(words[:len(words) // 2]) + "\n" + " ".join(words[len(words) // 2:])
