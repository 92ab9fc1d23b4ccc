"""Perplexity by position: how well the model predicts the next token, depending on how many tokens come before it.

The text is running text of the embedded corpus. The rows are positions 0-63, 64-127, 128-255 and so on, and all positions.
"""
import numpy as np

from mmx.evals import haystack
from mmx.evals.examples import Example, SuiteOptions, fit_to_length, make_rng

FIRST = 64      # positions in the first row


def example(length: int, row: str, seed, options: SuiteOptions) -> Example:
    """Exactly `length` ids, so that only one shape is compiled; the answers are the next ids."""
    essay = haystack.Essay(make_rng("position", length, seed), length, options.train)
    words, _ = fit_to_length(lambda n: " ".join(essay.take(n)), length + 1, options.tokenizer, "position")
    text = " ".join(essay.take(words + 2))      # more than fits; truncated to `length`, possibly inside a word
    ids = np.append(np.int32(options.tokenizer.bos), options.tokenizer.encode(text.encode()))[:length + 1]
    return Example(ids[:-1], ids[1:], meta={"seen": essay.uses_training_text(words + 2)})


def score(output, example: Example) -> dict[str, float]:
    """Mean nats per token, by row."""
    nats_T, _ = output
    scores, begin = {"all": float(np.mean(nats_T))}, 0
    while begin < len(nats_T):
        end = max(2 * begin, FIRST)
        scores[f"{begin}-{end - 1}"] = float(np.mean(nats_T[begin:end]))
        begin = end
    return scores


def perplexity(records) -> float:
    return float(np.exp(np.mean([record["score"] for record in records])))
