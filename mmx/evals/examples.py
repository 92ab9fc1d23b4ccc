"""The parts of a suite: examples, the options of a run, and prompts that fit a length.

A length is the number of tokens that the model has read before it answers: the beginning-of-text token and the prompt, in
tokens of the checkpoint's tokenizer. (RULER's lengths include the tokens of the answer.)
"""
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmx import config
from mmx.config import ConfigError, nearest
from mmx.data import images


class Example(NamedTuple):
    prompt: str | np.ndarray        # a text to continue, or token ids [T] to score
    answers: tuple | np.ndarray     # what the continuation should contain; for token ids the target ids [T], -1 for none
    steps: int = 0                  # at most so many tokens are generated
    stop: tuple[str, ...] = ()
    meta: dict = {}                 # further entries of the example's line in the results
    images: tuple = ()              # one for each placeholder in the prompt, anything that `mmx.data.images.read` takes


class SuiteOptions(NamedTuple):
    """The options of a run. Zero or empty: the suite's default."""
    tokenizer: object               # of mmx.data.tokens
    lengths: tuple[int, ...] = ()
    rows: tuple[str, ...] = ()
    examples: int = 0               # in each cell of the table
    seed: int = 0
    data: Path | None = None        # the user's files
    context: int = 0                # the longest prompt, in tokens
    train: bool = False             # make training examples: other ones than in the evaluation, from training text
    vision: config.Vision | None = None     # of the checkpoint


class PlannedExample(NamedTuple):
    """An example that is not made yet: its cell of the table, its index in the cell, and a function that makes it."""
    row: str
    column: str
    index: int
    make: Callable[[], Example]


def grid_plan(example, lengths, rows, examples: int, max_row: int = -1) -> Callable[[SuiteOptions], Iterator[PlannedExample]]:
    """The plan of a generated suite: examples for all lengths x rows.

    Args:
      example: makes an example from (length, row, seed, options).
      lengths, rows, examples: defaults; `examples` is the number in each cell.
      max_row: besides `rows`, --rows accepts numbers from 0 to `max_row`.
    """
    def plan(options):
        check_rows(options.rows, rows, max_row)
        for length in options.lengths or lengths:
            for row in options.rows or rows:
                for index in range(options.examples or examples):
                    seed = (options.seed, index, *["train"] * options.train)
                    yield PlannedExample(row, str(length), index,
                                         lambda length=length, row=row, seed=seed: example(length, row, seed, options))
    return plan


def check_rows(rows, known, max_row: int = -1):
    for row in rows:
        if row not in known and not (row.isdecimal() and int(row) <= max_row):
            hint = f"; known: {', '.join(known)}" if row.isdecimal() else nearest(row, known)
            raise ConfigError(f"--rows: there is no row {row!r}{hint}")


def format_length(column: str) -> str:
    """A column's length as users write it: "4k" for "4096". A column that is not a number is returned as it is."""
    if not column.isdecimal():
        return column
    value, unit = int(column), ""
    for larger_unit in "km":
        if value % 1024 or not value:
            break
        value, unit = value // 1024, larger_unit
    return f"{value}{unit}"


def make_rng(*key) -> np.random.Generator:
    """The random number generator of an example; it depends on `key` only."""
    return np.random.default_rng(list(repr(key).encode()))


def count_tokens(text: str, tokenizer) -> int:
    """Tokens of a prompt, including the beginning-of-text token."""
    return 1 + len(tokenizer.encode(text.encode()))


def prompt_length(example: Example, options: SuiteOptions) -> int:
    """Tokens of an example's prompt, including image tokens."""
    if not isinstance(example.prompt, str):
        return len(example.prompt)
    if not example.images:
        return count_tokens(example.prompt, options.tokenizer)
    image_tokens = sum(int(images.token_count(options.vision, *images.size(image))) for image in example.images)
    parts = images.split_text(options.vision, example.prompt.encode())
    return 1 + sum(len(options.tokenizer.encode(part, continues=n > 0)) for n, part in enumerate(parts)) + image_tokens


def answer_budget(tokenizer, least: int, answers) -> int:
    """Tokens to generate: at least `least`, the benchmark's number for tokens of about a word. With bytes, more are needed."""
    return max(least, 2 * count_tokens(", ".join(answers), tokenizer))


def fit_to_length(build, length: int, tokenizer, name: str, max_units: int | None = None) -> tuple[int, str]:
    """(n, build(n)): the largest n for which the prompt has at most `length` tokens.

    The search interpolates: prompts may have millions of tokens, so it builds only a few.

    Args:
      build: makes a prompt with n units of text, such as sentences or words.
      name: of the suite or the task, for error messages.
      max_units: upper limit of n.
    """
    low, text = 0, build(0)
    size = count_tokens(text, tokenizer)
    if size > length:
        raise ConfigError(f"length {length:,} is too short for {name}, whose shortest prompt has {size:,} tokens")
    if max_units == 0:
        return low, text
    unit, high, turn = (length - size) / 16, max_units and max_units + 1, 0     # the first guess is 16 units
    while high is None or high - low > 1:
        guess = low + max(1, int((length - size) / unit))
        if high is not None:
            guess = (low + high) // 2 if turn % 3 == 2 else min(guess, high - 1)
        turn += 1
        new_text = build(guess)
        new_size = count_tokens(new_text, tokenizer)
        unit = max((new_size - size) / (guess - low), 0.5)
        if new_size <= length and guess > 100 * length:
            raise ConfigError(f"{name}: the tokenizer does not split the text: it makes {new_size:,} tokens of {guess:,} words "
                              "or lines")
        if new_size <= length:
            low, text, size = guess, new_text, new_size
        else:
            high = guess
    return low, text


def training_record(example: Example) -> dict:
    """An example as a line of a .jsonl file for training: the loss covers the answers only."""
    if isinstance(example.prompt, str):
        return {"prompt": example.prompt, "completion": f" {', '.join(example.answers)}"}
    return {"tokens": example.prompt.tolist(), "targets": example.answers.tolist()}


def match_all(output: str, example: Example) -> float:
    """RULER's string_match_all: the fraction of the answers that the output contains, ignoring case."""
    return float(np.mean([answer.lower() in output.lower() for answer in example.answers]))


def match_part(output: str, example: Example) -> float:
    """RULER's string_match_part: whether the output contains one of the answers, ignoring case."""
    return float(any(answer.lower() in output.lower() for answer in example.answers))
