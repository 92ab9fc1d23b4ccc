"""MQAR, multi-query associative recall (Zoology, arXiv 2312.04927): pairs of tokens, then their keys again, in any order.

At each key the next token is its value. Gaps between a pair and its query follow Zoology's power law (exponent 0.01), what
is left is random tokens. Keys are drawn from the lower half of the tokens that stand for text, values from the upper, none
twice.
"""
import functools
import itertools

import numpy as np

from mmx.config import ConfigError
from mmx.data.token_tasks import power_law
from mmx.evals.examples import Ask, Example, draws

PAIRS = ("4", "16", "64")
VOCAB = 8192        # Zoology's, where the tokenizer has as many


def example(length: int, pairs: str, seed, ask: Ask) -> Example:
    """Exactly `length` ids, the beginning of text among them."""
    count, tokenizer = int(pairs), ask.tokenizer
    ids = _ids(tokenizer)
    keys, values = np.split(ids, 2)
    if not 0 < count <= len(keys):
        raise ConfigError(f"mqar: {count} pairs are not among 1 to {len(keys)}, which this tokenizer has ids for")
    if length < 1 + 4 * count:
        raise ConfigError(f"mqar: {count} pairs need {1 + 4 * count} tokens, length {length} is too short: give other --rows")
    draw = draws("mqar", length, pairs, seed)
    keys, values = (draw.choice(half, count, replace=False) for half in (keys, values))
    prompt, answers = draw.choice(ids, length), np.full(length, -1)
    prompt[0] = tokenizer.bos
    prompt[1:1 + 2 * count:2], prompt[2:2 + 2 * count:2] = keys, values
    space = (length - 1 - 2 * count) // 2
    queries = 1 + 2 * count + 2 * draw.choice(space, count, replace=False, p=power_law(space))
    prompt[queries], answers[queries] = keys, values
    return Example(prompt.astype(np.int32), answers.astype(np.int32))


@functools.cache
def _ids(tokenizer) -> np.ndarray:
    """An even number of them, VOCAB at most: specials and spare ids are no text."""
    found = list(itertools.islice((i for i in range(tokenizer.vocab) if tokenizer.decode([i])), VOCAB))
    return np.array(found[:len(found) // 2 * 2])


def score(output, example: Example) -> float:
    """The share of the queries whose likeliest next token is the value."""
    _, best_T = output
    asked_T = example.answers >= 0
    return float(np.mean(best_T[asked_T] == example.answers[asked_T]))
