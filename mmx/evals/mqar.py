"""MQAR, multi-query associative recall (Zoology, arXiv 2312.04927): pairs of tokens, then their keys again in random order.

At the second occurrence of a key, the next token should be its value. The distances follow Zoology's power law (exponent
0.01); all other tokens are random. Keys are different ids of the lower half of the text ids, values different ids of the upper
half.
"""
import functools
import itertools

import numpy as np

from mmx.config import ConfigError
from mmx.data.token_tasks import power_law
from mmx.evals.examples import Example, SuiteOptions, make_rng

PAIRS = ("4", "16", "64")
MAX_VOCAB = 8192        # Zoology's vocabulary; smaller if the tokenizer has fewer ids


def example(length: int, pairs: str, seed, options: SuiteOptions) -> Example:
    """Exactly `length` ids, including the beginning-of-text token."""
    count, tokenizer = int(pairs), options.tokenizer
    ids = _text_ids(tokenizer)
    keys, values = np.split(ids, 2)
    if not 0 < count <= len(keys):
        raise ConfigError(f"mqar: --rows {count} must be between 1 and {len(keys)} pairs, the most for this tokenizer")
    if length < 1 + 4 * count:
        raise ConfigError(f"mqar: {count} pairs need {1 + 4 * count} tokens, length {length} is too short: give other --rows")
    rng = make_rng("mqar", length, pairs, seed)
    keys, values = (rng.choice(half, count, replace=False) for half in (keys, values))
    prompt, answers = rng.choice(ids, length), np.full(length, -1)
    prompt[0] = tokenizer.bos
    prompt[1:1 + 2 * count:2], prompt[2:2 + 2 * count:2] = keys, values
    positions = (length - 1 - 2 * count) // 2
    queries = 1 + 2 * count + 2 * rng.choice(positions, count, replace=False, p=power_law(positions))
    prompt[queries], answers[queries] = keys, values
    return Example(prompt.astype(np.int32), answers.astype(np.int32))


@functools.cache
def _text_ids(tokenizer) -> np.ndarray:
    """Ids that decode to text (not special or unused ids): an even number of them, at most MAX_VOCAB."""
    ids = list(itertools.islice((i for i in range(tokenizer.vocab) if tokenizer.decode([i])), MAX_VOCAB))
    return np.array(ids[:len(ids) // 2 * 2])


def score(output, example: Example) -> float:
    """The fraction of queries whose likeliest next token is the value."""
    _, best_T = output
    query_T = example.answers >= 0
    return float(np.mean(best_T[query_T] == example.answers[query_T]))
