"""Synthetic tasks made of token ids. A source names a task and its parameters: "mqar:pairs=16,length=128,vocab=4096".

mqar: multi-query associative recall (Zoology, arXiv 2312.04927). A document is `pairs` pairs of a key and a value, then random
values among which each key occurs once more. At that second occurrence the target is the key's value; its distance from the
pair follows Zoology's power law. Keys are different ids of the lower half of the `vocab` ids, values different ids of the upper
half. (In Zoology the filler may contain keys.)
    few     draw only from the first `few` ids of each half; 0: from all
    tokens  size of the training split
    held    number of validation documents, and of test documents

facts: memorization. A document is one of `count` facts: a key of two ids, all keys different, and a value of two random ids,
2 log2(vocab) bits. The validation split and the test split each consist of `held` of the training facts, because this task
measures memory, not generalization.

`seed` changes the documents. A target is -1 where the loss does not count. Documents have no bos and no eos.
"""
import numpy as np

from mmx.config import ConfigError, nearest

POWER = 0.01        # exponent of Zoology's power law
NUMBERS = {
    "mqar": {"pairs": 16, "length": 128, "vocab": 4096, "few": 0, "tokens": 2**21, "held": 200, "seed": 0},
    "facts": {"count": 8192, "vocab": 256, "held": 2048, "seed": 0},
}


def matches(source: str) -> bool:
    """Whether a source names one of these tasks."""
    return source.partition(":")[0] in NUMBERS


def documents(source: str, split: str) -> list[tuple[str, tuple]]:
    """(name, (tokens_T, targets_T)) of the documents of a split."""
    task, numbers = parse(source)
    rng = np.random.default_rng((numbers["seed"], {"train": 0, "validation": 1, "test": 2}[split]))
    if task == "mqar":
        count = max(numbers["tokens"] // numbers["length"], 1) if split == "train" else numbers["held"]
        arrays = _mqar(numbers, count, rng)
    else:
        arrays = _facts(numbers, None if split == "train" else rng)
    return [(f"{source}/{split}/{number}", content) for number, content in enumerate(zip(*arrays))]


def power_law(positions: int) -> np.ndarray:
    """The probability that a query is at each of `positions` positions, by Zoology's power law."""
    probability = np.arange(1, positions + 1)**(POWER - 1.0)
    return probability / probability.sum()


def parse(source: str) -> tuple[str, dict]:
    """(task, its numbers) of a source; raises ConfigError."""
    task, _, text = source.partition(":")
    numbers = dict(NUMBERS[task])
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in numbers:
            raise ConfigError(f"data.sources: {source!r} has no number {name!r}{nearest(name, numbers)}")
        if not value.isdecimal() or len(value) > 9 or (not int(value) and name not in ("seed", "few")):
            raise ConfigError(f"data.sources: {source[:80]!r}: {name} needs a number from 1 to 999,999,999, got {value[:40]!r}")
        numbers[name] = int(value)
    n = numbers
    if task == "mqar" and not (n["few"] <= n["vocab"] // 2 and n["pairs"] <= (n["few"] or n["vocab"] // 2)
                               and 4 * n["pairs"] <= n["length"]):
        raise ConfigError(f"data.sources: {source!r}: {n['pairs']} pairs need length={4 * n['pairs']} or more, "
                          f"vocab={2 * n['pairs']} or more, and few (if set) between {n['pairs']} and half of vocab")
    if task == "facts" and n["count"] > n["vocab"]**2:
        raise ConfigError(f"data.sources: {source!r}: vocab={n['vocab']} allows {n['vocab']**2:,} keys, fewer than "
                          f"count={n['count']:,}")
    return task, numbers


def _mqar(n: dict, count: int, rng):
    pairs, length, half = n["pairs"], n["length"], n["vocab"] // 2
    few = n["few"] or half
    keys, values = _distinct(rng, (count, pairs), few), half + _distinct(rng, (count, pairs), few)
    tokens, targets = rng.integers(half, half + few, size=(count, length)), np.full((count, length), -1)
    tokens[:, 0:2 * pairs:2], tokens[:, 1:2 * pairs:2] = keys, values
    positions = length // 2 - pairs
    # Gumbel noise: the largest are draws without replacement
    order = np.log(power_law(positions)) + rng.gumbel(size=(count, positions))
    queries = 2 * pairs + 2 * np.argsort(-order, axis=1)[:, :pairs]
    np.put_along_axis(tokens, queries, keys, 1)
    np.put_along_axis(targets, queries, values, 1)
    return tokens.astype(np.int32), targets.astype(np.int32)


def _facts(n: dict, rng):
    """All facts, or `held` of them drawn by `rng`."""
    all_facts = np.random.default_rng(n["seed"])
    keys = all_facts.choice(n["vocab"]**2, n["count"], replace=False)
    values = all_facts.integers(n["vocab"], size=(n["count"], 2))
    if rng:
        chosen = rng.choice(n["count"], min(n["held"], n["count"]), replace=False)
        keys, values = keys[chosen], values[chosen]
    tokens = np.stack([keys // n["vocab"], keys % n["vocab"], values[:, 0]], 1)
    targets = np.concatenate([np.full((len(keys), 1), -1), values], 1)
    return tokens.astype(np.int32), targets.astype(np.int32)


def _distinct(rng, shape, below: int):
    """Rows of different numbers below `below`. A row with a repetition is drawn again."""
    if shape[1] > below // 16:      # most rows would have a repetition
        return np.stack([rng.choice(below, shape[1], replace=False) for _ in range(shape[0])])
    rows = rng.integers(below, size=shape)
    while len(repeated := np.flatnonzero((np.diff(np.sort(rows, 1), axis=1) == 0).any(1))):
        rows[repeated] = rng.integers(below, size=(len(repeated), shape[1]))
    return rows
