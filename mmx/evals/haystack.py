"""Text to hide things in: the embedded corpus, its test and validation files first.

What goes beyond them is text of the corpus' training part, and what goes beyond that begins again; either is `seen`. Examples
to train on take the training part alone.
"""
import functools
import re

from mmx.data import corpus


class Essay:
    """Running text from a place drawn in the held-out files (`train`: in the others); from their beginning where `length`
    words may not fit."""

    def __init__(self, draws, length: int, train: bool = False):
        self.first, self.then = (("train",), ()) if train else (("test", "validation"), ("train",))
        self.start = int(draws.random() * max(0, len(_words(*self.first)) - length))

    def take(self, count: int) -> list[str]:
        """The first `count` words."""
        words, end = _words(*self.first), self.start + count
        if end > len(words):
            words = words + _words(*self.then)
            words = words * -(-end // len(words))
        return words[self.start:end]

    def seen(self, count: int) -> bool:
        """Whether some of these words stand in the training part."""
        return not self.then or self.start + count > len(_words(*self.first))


@functools.cache
def _words(*splits: str) -> list[str]:
    return [word for split in splits for _, raw in corpus.documents(split) for word in raw.decode("utf-8", "replace").split()]


@functools.cache
def vocabulary() -> list[str]:
    """Some 8,000 English words of 4 to 10 letters, sorted."""
    return sorted({word for word in _words("test", "validation") if re.fullmatch("[a-z]{4,10}", word)})


def words(draws, count: int) -> list[str]:
    """Different words; pairs of them, hyphenated, where there are not as many."""
    single = vocabulary()
    if count <= len(single):
        return [single[i] for i in draws.choice(len(single), count, replace=False)]
    pairs = draws.choice(len(single)**2, count, replace=False)
    return [f"{single[i // len(single)]}-{single[i % len(single)]}" for i in pairs]


def hide(words: list[str], sentences: list[str], depths) -> str:
    """The text of `words` with sentence i at the sentence end nearest to depths[i] (0 to 1, ascending) of it."""
    ends = [0] + [i for i, word in enumerate(words, 1) if word[-1] in ".!?"] + [len(words)]
    parts, at = [], 0
    for sentence, depth in zip(sentences, depths):
        place = min(ends, key=lambda end: abs(end - depth * len(words)))
        parts += words[at:place] + [sentence]
        at = place
    return " ".join(parts + words[at:])
