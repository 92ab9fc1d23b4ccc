"""Text to hide needles in: the embedded corpus, first its test and validation files.

A longer text continues with the corpus' training split and then starts again from the beginning. Training examples use
the training split only.
"""
import functools
import re

from mmx.data import corpus


class Essay:
    """Running text that starts at a random position.

    Args:
      rng: draws the position.
      length: upper limit of the words that will be taken. The start is chosen so that at least `length` words of the split
        follow; it is the beginning of the split if the split has fewer.
      train: use the training split.
    """

    def __init__(self, rng, length: int, train: bool = False):
        self.first, self.then = (("train",), ()) if train else (("test", "validation"), ("train",))
        self.start = int(rng.random() * max(0, len(_words(*self.first)) - length))

    def take(self, count: int) -> list[str]:
        """The first `count` words."""
        words, end = _words(*self.first), self.start + count
        if end > len(words):
            words = words + _words(*self.then)
            words = words * -(-end // len(words))
        return words[self.start:end]

    def uses_training_text(self, count: int) -> bool:
        """Whether the first `count` words include words of the training split."""
        return not self.then or self.start + count > len(_words(*self.first))


@functools.cache
def _words(*splits: str) -> list[str]:
    return [word for split in splits for _, raw in corpus.documents(split) for word in raw.decode("utf-8", "replace").split()]


@functools.cache
def vocabulary() -> list[str]:
    """About 8,000 English words of 4 to 10 letters, sorted."""
    return sorted({word for word in _words("test", "validation") if re.fullmatch("[a-z]{4,10}", word)})


def words(rng, count: int) -> list[str]:
    """`count` different words; hyphenated pairs of words if there are not enough words."""
    single = vocabulary()
    if count <= len(single):
        return [single[i] for i in rng.choice(len(single), count, replace=False)]
    pairs = rng.choice(len(single)**2, count, replace=False)
    return [f"{single[i // len(single)]}-{single[i % len(single)]}" for i in pairs]


def insert_at_depths(words: list[str], sentences: list[str], depths) -> str:
    """The text of `words` with each sentence inserted at the end of a sentence near its depth.

    Args:
      depths: one for each sentence, ascending; 0 is the beginning of the text, 1 its end.
    """
    ends = [0] + [i for i, word in enumerate(words, 1) if word[-1] in ".!?"] + [len(words)]
    parts, begin = [], 0
    for sentence, depth in zip(sentences, depths):
        position = min(ends, key=lambda end: abs(end - depth * len(words)))
        parts += words[begin:position] + [sentence]
        begin = position
    return " ".join(parts + words[begin:])
