"""What suites are made of: an example, what a run asks for, and prompts that fit a length.

A length is what the model has read when it begins to answer: the beginning-of-text token and the prompt, in tokens of
the checkpoint's tokenizer. (RULER's lengths count the tokens of the answer, too.)
"""
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx import config
from mmx.config import ConfigError, nearest
from mmx.data import images


class Example(NamedTuple):
    prompt: str | np.ndarray        # a text to be continued, or token ids [T] to be read
    answers: tuple | np.ndarray     # what the continuation should hold, or the next ids [T], -1 where none is asked for
    steps: int = 0                  # tokens to generate at most
    stop: tuple[str, ...] = ()
    meta: dict = {}                 # more about it, for its line of the result
    images: tuple = ()              # that the prompt marks, what `mmx.data.images.read` takes


class Ask(NamedTuple):
    """What a run asks a suite for; zero and empty mean the suite's own."""
    tokenizer: object               # of mmx.data.tokens
    lengths: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    examples: int = 0               # in each cell of the table
    seed: int = 0
    data: Path | None = None        # the user's files
    context: int = 0                # tokens of a prompt at most
    train: bool = False             # to train on: other examples than those of an evaluation, in training text
    vision: config.Vision | None = None     # of the checkpoint


class Task(NamedTuple):
    """One example to come: its place in the table, its number there, and how it is made."""
    row: str
    column: str
    index: int
    make: Callable[[], Example]


def grid(example, lengths, rows, examples: int, most: int = -1) -> Callable[[Ask], Iterator[Task]]:
    """The plan of a generated suite: `example(length, row, seed, ask)` over lengths x rows.

    Lengths, rows and examples of a cell are defaults; other rows may be the numbers from 0 to `most`.
    """
    def plan(ask):
        check_rows(ask.rows, rows, most)
        for length in ask.lengths or lengths:
            for row in ask.rows or rows:
                for index in range(ask.examples or examples):
                    seed = (ask.seed, index, *["train"] * ask.train)
                    yield Task(row, str(length), index,
                               lambda length=length, row=row, seed=seed: example(length, row, seed, ask))
    return plan


def check_rows(rows, known, most: int = -1):
    for row in rows:
        if row not in known and not (row.isdecimal() and int(row) <= most):
            hint = f"; known: {', '.join(known)}" if row.isdecimal() else nearest(row, known)
            raise ConfigError(f"--rows: there is no row {row!r}{hint}")


def show_length(column: str) -> str:
    """A column of lengths as users write it."""
    if not column.isdecimal():
        return column
    value, unit = int(column), ""
    for unit_above in "km":
        if value % 1024 or not value:
            break
        value, unit = value // 1024, unit_above
    return f"{value}{unit}"


def draws(*key) -> np.random.Generator:
    """The random numbers of an example: a function of `key` alone."""
    return np.random.default_rng(list(repr(key).encode()))


def count(text: str, tokenizer) -> int:
    """Tokens of a prompt, the beginning of text among them."""
    return 1 + len(tokenizer.encode(text.encode()))


def size(example: Example, ask: Ask) -> int:
    """Tokens that are read before it is answered."""
    if not isinstance(example.prompt, str):
        return len(example.prompt)
    if not example.images:
        return count(example.prompt, ask.tokenizer)
    shown = sum(int(images.token_count(ask.vision, *images.size(image))) for image in example.images)
    return count(example.prompt.replace(images.PLACEHOLDER, ""), ask.tokenizer) + shown


def budget(tokenizer, least: int, answers) -> int:
    """Tokens to generate: at least those that a benchmark gives, which count words; bytes need more."""
    return max(least, 2 * count(", ".join(answers), tokenizer))


def fit(build, length: int, tokenizer, what: str, most: int | None = None) -> tuple[int, str]:
    """(n, build(n)): the most units (sentences, words) with which a prompt has at most `length` tokens.

    The search goes by proportion: prompts may be millions of tokens long, and few are built.
    """
    low, text = 0, build(0)
    size = count(text, tokenizer)
    if size > length:
        raise ConfigError(f"length {length:,} is too short for {what}, whose shortest prompt has {size:,} tokens")
    if most == 0:
        return low, text
    unit, high, turn = (length - size) / 16, most and most + 1, 0        # so that 16 units are tried first
    while high is None or high - low > 1:
        guess = low + max(1, int((length - size) / unit))
        if high is not None:
            guess = (low + high) // 2 if turn % 3 == 2 else min(guess, high - 1)
        turn += 1
        tried = build(guess)
        found = count(tried, tokenizer)
        unit = max((found - size) / (guess - low), 0.5)
        if found <= length and guess > 100 * length:
            raise ConfigError(f"{what}: the tokenizer makes {found:,} tokens of {guess:,} units of text: it does not cut it")
        if found <= length:
            low, text, size = guess, tried, found
        else:
            high = guess
    return low, text


def document(example: Example) -> dict:
    """An example as a line of a .jsonl to train on: its answers are learned, its prompt is not."""
    if isinstance(example.prompt, str):
        return {"prompt": example.prompt, "completion": f" {', '.join(example.answers)}"}
    return {"tokens": example.prompt.tolist(), "targets": example.answers.tolist()}


def match_all(output: str, example: Example) -> float:
    """RULER's string_match_all: the share of the answers that the output holds, whatever their case."""
    return float(np.mean([answer.lower() in output.lower() for answer in example.answers]))


def match_part(output: str, example: Example) -> float:
    """RULER's string_match_part: whether the output holds one of the answers."""
    return float(any(answer.lower() in output.lower() for answer in example.answers))
