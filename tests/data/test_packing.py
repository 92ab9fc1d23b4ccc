import collections

import numpy as np
import pytest

from mmx.data import packing

CASES = [([7], 3), ([2], 8), ([2, 2, 2], 8), ([8, 16], 8), ([9, 3, 40, 8, 2], 8), ([5, 5, 5], 1)]
CASES += [(np.random.default_rng(s).integers(2, 60, 1 + s).tolist(), int(1 + s * 7 % 23)) for s in range(20)]


def numbered(lengths):
    """Documents whose tokens encode document number and position."""
    return [np.arange(n) + 1000 * d for d, n in enumerate(lengths, 1)]


def pairs(rows):
    return collections.Counter((int(t), int(y)) for r in rows
                               for t, y, w in zip(r["tokens"], r["targets"], r["weights"]) if w)


@pytest.mark.parametrize("lengths,length", CASES)
def test_every_pair_of_every_document_once_without_padding(lengths, length):
    rows = list(packing.Packed(numbered(lengths), length))
    assert len(rows) == -(-sum(lengths) // length)
    assert all(row["segments"].all() for row in rows)
    tokens = collections.Counter(int(t) for r in rows for t in r["tokens"])
    twice = collections.Counter(tokens)
    twice.subtract(int(t) for d in numbered(lengths) for t in d)
    assert all(n >= 0 for n in twice.values()) and sum(twice.values()) == -sum(lengths) % length < length
    wanted = {(int(t), int(t) + 1) for d in numbered(lengths) for t in d[:-1]}
    found = pairs(rows)
    assert set(found) == wanted
    assert sum(found.values()) - len(wanted) <= sum(twice.values())


@pytest.mark.parametrize("lengths,length", CASES)
def test_segments_count_documents_and_positions_count_within(lengths, length):
    for row in packing.Packed(numbered(lengths), length):
        assert {k: (v.dtype, v.shape) for k, v in row.items()} == {
            **{k: (np.int32, (length,)) for k in ("tokens", "targets", "segments", "positions")},
            "weights": (np.float32, (length,))}
        segments, positions, tokens = row["segments"], row["positions"], row["tokens"]
        assert segments[0] == 1 and positions[0] == 0
        joined = np.diff(tokens) == 1
        assert set(np.diff(segments)) <= {0, 1}
        np.testing.assert_array_equal(np.diff(segments) == 0, np.diff(positions) == 1)
        assert np.all(positions[1:][np.diff(segments) == 1] == 0)
        assert np.all(joined[np.diff(segments) == 0])


def test_eos_has_no_target_and_the_token_before_a_split_has_one():
    rows = list(packing.Packed([np.array([256, 97, 98, 257]), np.array([256, 99, 257])], 3))
    assert rows[0]["targets"].tolist() == [97, 98, 257] and rows[0]["weights"].tolist() == [1, 1, 1]
    assert rows[2]["tokens"].tolist() == [257, 256, 97] and rows[2]["weights"].tolist() == [0, 1, 1]
    assert rows[1]["tokens"].tolist() == [256, 99, 257] and rows[1]["weights"].tolist() == [1, 1, 0]


def test_explicit_targets_stay_with_their_tokens():
    """In any row, together with documents whose targets are the next tokens."""
    documents = numbered([40, 7, 23])
    explicit = documents[2] % 5 - 1     # -1 is none
    rows = list(packing.Packed(packing.Documents(documents, [None, None, explicit]), 9))
    wanted = {int(t): int(y) for t, y in zip(documents[2], explicit) if y >= 0}
    wanted |= {int(t): int(t) + 1 for d in documents[:2] for t in d[:-1]}
    assert set(pairs(rows)) == set(wanted.items())
    assert all(np.all(r["targets"] >= 0) and set(r["weights"]) <= {0, 1} for r in rows)


def test_full_rows_of_a_document_contain_only_that_document():
    rows = list(packing.Packed(numbered([100, 37, 5]), 16))
    assert sum(row["segments"].max() == 1 for row in rows) >= 100 // 16 + 37 // 16


def test_rows_are_random_access_and_bounded():
    packed = packing.Packed(numbered([100, 37, 5]), 16)
    np.testing.assert_array_equal(packed[5]["tokens"], list(packed)[5]["tokens"])
    for row in (-1, len(packed)):
        with pytest.raises(IndexError):
            packed[row]


@pytest.mark.parametrize("lengths,length", CASES)
def test_documents_with_explicit_targets_are_split_only_if_longer_than_a_row(lengths, length):
    """Every third document has explicit targets; the rows of the other documents do not change."""
    documents = numbered([n for n in lengths for _ in range(3)])
    explicit = [d if i % 3 == 1 else None for i, d in enumerate(documents)]
    rows = list(packing.Packed(packing.Documents(documents, explicit), length))
    wanted = {(int(t), int(t)) for d in explicit if d is not None for t in d}
    found = pairs(rows)
    assert {pair for pair in found if pair[0] == pair[1]} == wanted
    for document in filter(lambda d: d is not None and len(d) <= length, explicit):
        hits = [(n, row["tokens"].tolist().index(document[0])) for n, row in enumerate(rows) if document[0] in row["tokens"]]
        assert len(hits) == 1 and found[int(document[0]), int(document[0])] == 1
        [(n, at)] = hits
        np.testing.assert_array_equal(rows[n]["tokens"][at:at + len(document)], document)
    text = [d for d, targets in zip(documents, explicit) if targets is None]
    full = {row["tokens"].tobytes() for row in packing.Packed(text, length)}
    assert max(lengths) > length or full <= {row["tokens"].tobytes() for row in rows}


@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 17, 50])
@pytest.mark.parametrize("context", [0, 3, 7])
def test_evaluation_reads_every_target_once_with_context(count, context):
    [document] = numbered([count])
    rows = list(packing.rows(document, 8, context))
    assert pairs(rows) == {(int(t), int(t) + 1): 1 for t in document[:-1]}
    for row in rows[1:]:
        assert np.all(row["weights"][:context] == 0) and np.any(row["weights"])
        assert np.all(row["tokens"][:context] > 0)
    assert all(np.all(row["segments"][np.diff(row["tokens"], prepend=row["tokens"][0] - 1) == 1] == 1) for row in rows)
    assert all(np.all((row["segments"] == 0) == (row["tokens"] == 0)) for row in rows)


def test_batches_contain_several_documents_and_are_padded():
    documents = numbered([20, 3, 9])
    counted = collections.defaultdict(collections.Counter)
    for document_B, batch in packing.batches(((document, None) for document in documents), 8, batch=4):
        assert batch["tokens"].shape == (4, 8) and document_B.shape == (4,)
        for b, d in enumerate(document_B):
            counted[int(d)] += pairs([{k: v[b] for k, v in batch.items()}])
    assert dict(counted) == {d: {(int(t), int(t) + 1): 1 for t in document[:-1]} for d, document in enumerate(documents)}


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.int64])
def test_a_row_equals_its_spans_one_by_one(kind):
    """Documents with and without explicit targets, empty spans, and padding at the end."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        spans, room = [], 40
        for _ in range(rng.integers(0, 6)):
            document, own = rng.integers(0, 200, 12).astype(kind), rng.integers(-1, 200, 12) if rng.random() < 0.5 else None
            start = int(rng.integers(0, 12))
            stop = min(int(rng.integers(start, 13)), start + room)
            spans, room = [*spans, (document, start, stop, own)], room - (stop - start)
        arrays = [packing.span_arrays(document[start:stop + 1], own, start, stop) for document, start, stop, own in spans]
        row = packing._make_row(arrays, [stop - start for _, start, stop, _ in spans], 40)
        at = 0
        for segment, (document, start, stop, own) in enumerate(spans, 1):
            for position, place in enumerate(range(start, stop)):
                following = document[place + 1] if place + 1 < len(document) else -1
                target = int(following if own is None else own[place])
                got = [row[name][at] for name in ("tokens", "targets", "weights", "segments", "positions")]
                assert got == [document[place], max(target, 0), target >= 0, segment, position]
                at += 1
        assert not any(x[at:].any() for x in row.values()) and all(len(x) == 40 for x in row.values())
        assert {x.dtype for x in row.values()} == {np.dtype(np.int32), np.dtype(np.float32)}
