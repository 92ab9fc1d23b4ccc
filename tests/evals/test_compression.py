"""Bits per byte against a direct computation on logits, and the baselines against direct calls."""
import gzip
import json
import lzma
import math

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from mmx import config
from mmx.checkpoints import convert, manager, run_config
from mmx.config import ConfigError
from mmx.data import held_out, tokens
from mmx.evals import compression
from mmx.model import Model, logits
from mmx.training import metrics
from mmx.training.evaluate import first_bytes, make_evaluator

MODEL = Model(config.Model(dim=16, layers=2, pattern="LS", heads=2, kv_heads=1, head_dim=8, rotary_dim=4, experts=4,
                           expert_dim=16, init="fan_in", embed_std=1.0))
TEXT = "Fellow citizens, the état of the Union is strong. ".encode()
DOCUMENTS = [("a", TEXT), ("b", TEXT[:7]), ("c", b"\xff\x00\x80" * 9)]


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), np.zeros((1, 1), np.int32))["params"]


@jax.jit
def logp_TW(params, window_T):
    return jax.nn.log_softmax(logits(params, MODEL.apply({"params": params}, window_T[None])[0])[0])


def direct(params, raw, length, overlap):
    """Bits per byte, one window of a document at a time. In later windows the first `overlap` tokens are context only."""
    ids, nats, start = np.array([256, *raw, 257]), 0.0, 0
    while not start or start + overlap < len(ids) - 1:
        window, targets = ids[start:start + length], ids[start + 1:start + length + 1]
        logps = np.array(logp_TW(params, np.pad(window, (0, length - len(window)))))   # causal: padding has no effect
        first = overlap if start else 0
        nats -= logps[np.arange(first, len(targets)), targets[first:]].sum()
        start += length - overlap
    return nats / np.log(2) / len(raw)


@pytest.mark.parametrize("length,overlap,batch", [(64, 0, 2), (16, 8, 3), (12, 11, 4)])
def test_bits_per_byte_equal_those_of_the_logits(params, length, overlap, batch):
    evaluate = make_evaluator(MODEL, tokens.tokenizer("bytes"), length=length, batch=batch, overlap=overlap,
                                         loss_chunk=2 * batch)
    found = evaluate(params, DOCUMENTS)
    for name, raw in DOCUMENTS:
        assert found.by_document[name] == pytest.approx(direct(params, raw, length, overlap), rel=1e-5)
    sizes = [len(raw) for _, raw in DOCUMENTS]
    assert found.bits_per_byte == pytest.approx(np.average(list(found.by_document.values()), weights=sizes))
    assert found.loss == pytest.approx(found.bits_per_byte * math.log(2) * sum(sizes) / (sum(sizes) + 3))       # and three eos
    assert (found.targets, found.bytes, found.documents) == (sum(sizes) + 3, sum(sizes), 3)


def test_limit_reads_the_first_bytes(params):
    evaluate = make_evaluator(MODEL, tokens.tokenizer("bytes"), length=16, batch=4, overlap=8, loss_chunk=64)
    assert evaluate(params, DOCUMENTS, 20) == evaluate(params, [("a", TEXT[:20])])
    assert evaluate(params, DOCUMENTS, 10**6) == evaluate(params, DOCUMENTS) == evaluate(params, DOCUMENTS, 0)


def test_head_cuts_where_a_character_begins():
    def head(limit):
        return first_bytes([("a", "aé€😀".encode()), ("b", b"xyz")], limit)
    whole = "aé€😀".encode()
    kept = [b"a", b"a", whole[:3], whole[:3], whole[:3], whole[:6], whole[:6], whole[:6], whole[:6], whole]
    assert [head(limit) for limit in range(1, 11)] == [[("a", raw)] for raw in kept]
    assert head(12) == [("a", whole), ("b", b"xy")] and head(13) == head(0) == head(99) == [("a", whole), ("b", b"xyz")]
    assert first_bytes([("c", b"\x80" * 9)], 5) == [("c", b"\x80" * 5)]      # no UTF-8: cut anywhere


def test_baselines_compress_files_separately():
    documents = held_out.validation(config.Data())[:2]
    (_, a), (_, b) = documents
    found, size = compression.baselines(documents), len(a) + len(b)
    assert found["gzip"] == 8 * (len(gzip.compress(a, 9, mtime=0)) + len(gzip.compress(b, 9, mtime=0))) / size
    assert found["xz"] == 8 * sum(len(lzma.compress(x, preset=9 | lzma.PRESET_EXTREME)) for x in (a, b)) / size
    assert len({found["xz"], found["gzip"], *compression.baselines([("", a + b)]).values()}) == 4
    assert found["xz"] != 8 * sum(len(lzma.compress(x, preset=9)) for x in (a, b)) / size    # -9e is larger for these files


@pytest.fixture(scope="module")
def run(params, tmp_path_factory):
    """A workdir with checkpoints of steps 1 and 2, killed in step 4."""
    folder = tmp_path_factory.mktemp("run")
    for name in "abcd":
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{name}.txt").write_bytes(TEXT * 9)
    workdir = folder / "run"
    run_config.check_config(workdir, config.Experiment(
        MODEL.config, config.Train(length=32), config.Data((str(folder / "text"),))))
    checkpoints = manager.Checkpoints(workdir, every=1, keep=2)
    for step in (1, 2):
        checkpoints.save(step, jax.tree.map(lambda x: x / step, params), {"count": np.zeros(1)}, {})
    checkpoints.close()
    records = [{"step": n, "tokens": 100 * n, "seconds": n / 2, "bits_per_byte": 9.0 - n} for n in (1, 2, 3)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return workdir


@pytest.fixture(scope="module")
def found(run):
    return compression.evaluate_checkpoint(run)


def test_a_checkpoint_is_evaluated_on_its_validation_documents(run, found, params, tmp_path):
    documents = held_out.validation(config.Data((str(run.parent / "text"),)))
    evaluate = make_evaluator(MODEL, tokens.tokenizer("bytes"), length=32, batch=8, overlap=16,
                                         loss_chunk=100)
    wanted = evaluate(jax.tree.map(lambda x: x / 2, params), documents)
    assert found["bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)
    assert found["per_file"] == pytest.approx(wanted.by_document, rel=1e-6) and found["files"] == len(documents)
    assert {name: found[name] for name in ("gzip", "xz")} == compression.baselines(documents)
    assert (found["steps"], found["train_seconds"], found["train_tokens"]) == (2, 1.0, 200)
    assert compression.plot_curve(run, found, tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_skipped_steps_and_rollbacks_are_plotted(run, found, tmp_path, monkeypatch):
    """Steps with a non-finite value are left out of the curve."""
    counts = [(0, 0, 3.0), (1, 0, math.nan), (2, 0, 2.9), (2, 1, 2.8)]
    monkeypatch.setattr(metrics, "read", lambda workdir, *names: [
        {"step": 1, "tokens": 100 * n, "bits_per_byte": bits, "skipped": skipped, "rollbacks": rollbacks}
        for n, (skipped, rollbacks, bits) in enumerate(counts, 1)])
    drawn = {}

    def savefig(figure, *args, **kwargs):
        axes, = figure.axes
        drawn.update({line.get_label(): line.get_xydata().tolist() for line in axes.lines} | {"limits": axes.get_ylim()})
    monkeypatch.setattr(Figure, "savefig", savefig)
    compression.plot_curve(run, found | {"bits_per_byte": 0.8}, tmp_path / "c.png")
    assert drawn["limits"][0] < 0.8
    compression.plot_curve(run, found, tmp_path / "c.png")
    assert drawn["limits"] == (1.5, 5)
    assert drawn["steps skipped (2)"] == [[2e-4, pytest.approx(2.95)], [3e-4, 2.9]]
    assert drawn["rollbacks (1)"] == [[4e-4, 2.8]]


def test_an_earlier_checkpoint_is_evaluated(run, found):
    first = compression.evaluate_checkpoint(run / "checkpoints" / "1", limit=100)
    assert first["bytes"] == 100 < found["bytes"]
    assert (first["steps"], first["train_seconds"]) == (1, 0.5) and first["bits_per_byte"] != found["bits_per_byte"]


def test_a_converted_checkpoint_has_no_training_curve(run, found, tmp_path):
    convert.to_hf(run, tmp_path / "hf", progress=False)
    theirs = compression.evaluate_checkpoint(tmp_path / "hf", source=str(run.parent / "text"))
    assert "steps" not in theirs and compression.plot_curve(tmp_path / "hf", theirs, tmp_path / "c.png") is None
    assert theirs["per_file"].keys() == found["per_file"].keys() and theirs["bytes"] == found["bytes"]
    assert theirs["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=0.2)       # in rows of 512, not 32


def test_no_documents_is_one_line(run, tmp_path):
    (tmp_path / "one.txt").write_bytes(TEXT)
    with pytest.raises(ConfigError, match="one.txt has no test documents without images: use another --split or --source"):
        compression.evaluate_checkpoint(run, "test", str(tmp_path / "one.txt"))
