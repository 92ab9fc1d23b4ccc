"""Synthetic tasks of token ids, solved by independent rules that see only the document."""
import collections

import numpy as np
import pytest

from mmx.config import ConfigError
from mmx.data import sources, token_tasks

MQAR = "mqar:pairs=6,length=40,vocab=64,tokens=4000,held=30,seed=3"
FACTS = "facts:count=500,vocab=32,held=40,seed=3"


def by_split(source):
    return {split: [content for _, content in sources.documents(source, split)] for split in ("train", "validation", "test")}


def test_mqar_is_solved_by_looking_up_the_pairs():
    """Looking up each repeated key among the pairs gives every target, and there are no other targets."""
    splits = by_split(MQAR)
    assert {split: len(found) for split, found in splits.items()} == {"train": 100, "validation": 30, "test": 30}
    gaps = []
    for ids, targets in (document for found in splits.values() for document in found):
        assert len(ids) == len(targets) == 40
        value_of = dict(zip(ids[:12:2].tolist(), ids[1:12:2].tolist()))
        assert len(value_of) == len(set(value_of.values())) == 6
        assert max(value_of) < 32 <= min(value_of.values()) and ids.max() < 64
        queries = np.flatnonzero(targets >= 0)
        assert np.delete(ids, [*range(0, 12, 2), *queries]).min() >= 32     # a key occurs twice: in its pair and as a query
        assert {int(ids[n]): int(targets[n]) for n in queries} == value_of and len(queries) == 6 and queries.min() >= 12
        gaps += [n - ids[:12:2].tolist().index(ids[n]) * 2 for n in queries]
    assert len(set(gaps)) == 19     # all possible ones, from 2 to 38
    documents = [tuple(ids) for found in splits.values() for ids, _ in found]
    assert len(set(documents)) == len(documents) == 160


def test_few_limits_the_ids_of_each_half():
    for ids, targets in by_split(MQAR + ",few=7")["train"]:
        assert set(ids) | set(targets) <= {-1, *range(7), *range(32, 39)} and len(set(ids[:12:2])) == 6


def test_distances_of_queries_follow_the_power_law():
    probability = token_tasks.power_law(8)
    assert probability[0] / probability[3] == pytest.approx(4 ** 0.99) and probability.sum() == pytest.approx(1)
    first = collections.Counter(np.flatnonzero(targets >= 0)[0] for targets in (
        content[1] for content in by_split("mqar:pairs=1,length=18,vocab=64,tokens=54000,seed=1")["train"]))
    for n, part in enumerate(probability):
        assert abs(first[2 + 2 * n] - 3000 * part) < 4 * (3000 * part) ** 0.5


def test_held_out_facts_are_training_facts():
    splits = by_split(FACTS)
    known = {tuple(ids[:2]): tuple(targets[1:]) for ids, targets in splits["train"]}
    assert len(splits["train"]) == len(known) == 500
    for ids, targets in (document for found in splits.values() for document in found):
        assert len(ids) == 3 and targets[0] == -1 and ids[2] == targets[1] and known[tuple(ids[:2])] == tuple(targets[1:])
    assert len(splits["validation"]) == len({tuple(ids[:2]) for ids, _ in splits["validation"]}) == 40
    values = list(known.values())
    assert len(set(values)) > 300 and max(map(max, values)) == 31


@pytest.mark.parametrize("source", [MQAR, FACTS])
def test_the_seed_decides_the_documents(source):
    one, again, other = (by_split(s)["train"] for s in (source, source, source.replace("seed=3", "seed=4")))
    np.testing.assert_equal(one, again)
    assert not all(np.array_equal(a[0], b[0]) for a, b in zip(one, other))


@pytest.mark.parametrize("source, message", [
    ("mqar:pair=4", "'mqar:pair=4' has no number 'pair'; did you mean pairs?"),
    ("mqar:pairs=0", "pairs needs a number from 1 to 999,999,999, got '0'"),
    ("facts:count=ten", "count needs a number from 1 to 999,999,999, got 'ten'"),
    ("mqar:vocab=" + "9" * 5000, f"vocab needs a number from 1 to 999,999,999, got '{'9' * 40}'"),
    ("mqar:pairs=16,length=63", "16 pairs need length=64 or more"),
    ("mqar:pairs=16,few=15", "few (if set) between 16 and half of vocab"), ("mqar:few=33,vocab=64", "between 16 and half of"),
    ("facts:count=5000,vocab=64", "vocab=64 allows 4,096 keys, fewer than count=5,000"),
])
def test_mistakes_are_one_line(source, message):
    with pytest.raises(ConfigError) as caught:
        sources.documents(source, "train")
    assert message in str(caught.value) and "\n" not in str(caught.value), caught.value
