"""Tasks made of ids, which a source names with their numbers, as "mqar:pairs=16,length=128,vocab=4096".

mqar: multi-query associative recall (Zoology, arXiv 2312.04927). `pairs` of a key and a value, then the keys again, whose next
token is to be the value, at gaps that follow Zoology's power law. Keys are drawn from the lower half of the `vocab` ids, values
from the upper, none twice; what is left are random values (Zoology's are of all ids: a key may come again, by chance, with
another token behind it, and of a small vocabulary often does). `few`: of each half only the first ids are drawn, so many of
them; 0: all. `tokens` of training documents, `held` documents to validate on.

facts: `count` keys of two ids, none twice, and a value of two random ids each, 2 log2(vocab) bits to remember. There is nothing
to generalise to: what is held out are `held` of the same facts, and the question is how many are known.

`seed` makes other documents. Targets are -1 where nothing is to be learned. No document has a beginning or an end of text.
"""
import numpy as np

from mmx.config import ConfigError, nearest

POWER = 0.01        # Zoology's
NUMBERS = {
    "mqar": {"pairs": 16, "length": 128, "vocab": 4096, "few": 0, "tokens": 2**21, "held": 200, "seed": 0},
    "facts": {"count": 8192, "vocab": 256, "held": 2048, "seed": 0},
}


def names(source: str) -> bool:
    """Whether a source is one of these."""
    return source.partition(":")[0] in NUMBERS


def documents(source: str, split: str) -> list[tuple[str, tuple]]:
    """(name, (tokens_T, targets_T)) of a part of the source."""
    kind, n = _read(source)
    draw = np.random.default_rng((n["seed"], {"train": 0, "validation": 1, "test": 2}[split]))
    if kind == "mqar":
        found = _mqar(n, max(n["tokens"] // n["length"], 1) if split == "train" else n["held"], draw)
    else:
        found = _facts(n, None if split == "train" else draw)
    return [(f"{source}/{split}/{number}", content) for number, content in enumerate(zip(*found))]


def near(space: int) -> np.ndarray:
    """Shares of the `space` places for a query, by Zoology's power law."""
    share = np.arange(1, space + 1)**(POWER - 1.0)
    return share / share.sum()


def _read(source: str) -> tuple[str, dict]:
    kind, _, text = source.partition(":")
    numbers = dict(NUMBERS[kind])
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in numbers:
            raise ConfigError(f"data.sources: {source!r} has no {name!r}{nearest(name, numbers)}")
        if not value.isdecimal() or len(value) > 9 or (not int(value) and name not in ("seed", "few")):
            raise ConfigError(f"data.sources: {source[:80]!r}: {name} needs a number, 1 to 999,999,999, got {value[:40]!r}")
        numbers[name] = int(value)
    n = numbers
    if kind == "mqar" and not (n["few"] <= n["vocab"] // 2 and n["pairs"] <= (n["few"] or n["vocab"] // 2)
                               and 4 * n["pairs"] <= n["length"]):
        raise ConfigError(f"data.sources: {source!r}: {n['pairs']} pairs need {4 * n['pairs']} tokens, and {n['pairs']} ids of "
                          f"each half of {n['vocab']}, or of the few that are drawn")
    if kind == "facts" and n["count"] > n["vocab"]**2:
        raise ConfigError(f"data.sources: {source!r}: {n['vocab']} ids make {n['vocab']**2:,} keys, not {n['count']:,}")
    return kind, numbers


def _mqar(n: dict, count: int, draw):
    pairs, length, half = n["pairs"], n["length"], n["vocab"] // 2
    few = n["few"] or half
    keys, values = _distinct(draw, (count, pairs), few), half + _distinct(draw, (count, pairs), few)
    tokens, targets = draw.integers(half, half + few, size=(count, length)), np.full((count, length), -1)
    tokens[:, 0:2 * pairs:2], tokens[:, 1:2 * pairs:2] = keys, values
    space = length // 2 - pairs
    order = np.log(near(space)) + draw.gumbel(size=(count, space))      # the greatest: drawn one by one, none twice
    places = 2 * pairs + 2 * np.argsort(-order, axis=1)[:, :pairs]
    np.put_along_axis(tokens, places, keys, 1)
    np.put_along_axis(targets, places, values, 1)
    return tokens.astype(np.int32), targets.astype(np.int32)


def _facts(n: dict, draw):
    every = np.random.default_rng(n["seed"])
    keys = every.choice(n["vocab"]**2, n["count"], replace=False)
    values = every.integers(n["vocab"], size=(n["count"], 2))
    if draw:
        kept = draw.choice(n["count"], min(n["held"], n["count"]), replace=False)
        keys, values = keys[kept], values[kept]
    tokens = np.stack([keys // n["vocab"], keys % n["vocab"], values[:, 0]], 1)
    targets = np.concatenate([np.full((len(keys), 1), -1), values], 1)
    return tokens.astype(np.int32), targets.astype(np.int32)


def _distinct(draw, shape, below: int):
    """Rows of different numbers: those that have one twice are drawn again."""
    if shape[1] > below // 16:      # seldom free of a repetition
        return np.stack([draw.choice(below, shape[1], replace=False) for _ in range(shape[0])])
    found = draw.integers(below, size=shape)
    while len(again := np.flatnonzero((np.diff(np.sort(found, 1), axis=1) == 0).any(1))):
        found[again] = draw.integers(below, size=(len(again), shape[1]))
    return found
