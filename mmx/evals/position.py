"""Perplexity by position: how well the next token is told, by how many tokens stand before it.

The text is running text of the embedded corpus. Rows are 0-63, 64-127, 128-255 and so on, and all positions together.
"""
import numpy as np

from mmx.evals import haystack
from mmx.evals.examples import Ask, Example, draws, fit

FIRST = 64      # positions of the first row


def example(length: int, row: str, seed, ask: Ask) -> Example:
    """Exactly `length` ids, so that one shape is compiled for all; the answers are the tokens that follow."""
    essay = haystack.Essay(draws("position", length, seed), length, ask.train)
    words, _ = fit(lambda n: " ".join(essay.take(n)), length + 1, ask.tokenizer, "position")
    text = " ".join(essay.take(words + 2))      # more than fit; cut inside a word, if need be
    ids = np.append(np.int32(ask.tokenizer.bos), ask.tokenizer.encode(text.encode()))[:length + 1]
    return Example(ids[:-1], ids[1:], meta={"seen": essay.seen(words + 2)})


def score(output, example: Example) -> dict[str, float]:
    """Mean nats a token, by row."""
    nats_T, _ = output
    found, begin = {"all": float(np.mean(nats_T))}, 0
    while begin < len(nats_T):
        end = max(2 * begin, FIRST)
        found[f"{begin}-{end - 1}"] = float(np.mean(nats_T[begin:end]))
        begin = end
    return found


def perplexity(records) -> float:
    return float(np.exp(np.mean([record["score"] for record in records])))
