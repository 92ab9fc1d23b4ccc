"""The loop: what stops a run leaves it resumable bit by bit, each step is told once, and devices change nothing."""
import dataclasses
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmx import config
from mmx.checkpoints import convert, manager
from mmx.checkpoints.convert import load
from mmx.config import ConfigError
from mmx.data import pipeline
from mmx.inference import engine
from mmx.model import Model
from mmx.training import loss as losses
from mmx.training import metrics, optim, train
from mmx.training.guards import DivergedError

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "tokens_per_s", "flops_per_s"}
STEPS = 12
MODEL = {"dim": 16, "layers": 2, "pattern": "LS", "heads": 2, "kv_heads": 1, "head_dim": 8, "rotary_dim": 4, "experts": 4,
         "expert_dim": 16, "init": "fan_in", "embed_std": 1.0}
DIE = """
import os, sys
from mmx import config, optim, train
experiment, workdir, step, signal = config.from_json(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rate = optim.learning_rate
def learning_rate(t, at, progress):
    if at == step:
        os.kill(os.getpid(), signal)
    return rate(t, at, progress)
optim.learning_rate = learning_rate
print(train.run(experiment, workdir))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for name in "abcdefgh":
        (folder / f"{name}.txt").write_text("".join(rng.choice(["state ", "of ", "the ", "union ", "people "], 2000)))
    return str(folder)


def experiment(text, model=(), mesh=(), every=5, guard=(), **changes):
    options = {"steps": STEPS, "batch": 4, "length": 32, "warmup": 2, "lr": 1e-2, "log_every": 1, "tensorboard": False}
    return config.build({"model": {**MODEL, "capacity": 1.0, **dict(model)}, "train": options | changes,
                         "data": {"sources": (text,)},
                         "checkpoint": {"every": every}, "guard": dict(guard), "mesh": {"edp": 1, **dict(mesh)}})


def ramped(text, **changes):
    """Steps of one micro-batch, from 512 tokens on of two."""
    return experiment(text, ramp=((0, 1), (512, 2)), **changes)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """An uninterrupted run, evaluated and sampled on its way."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = train.run(ramped(text, tensorboard=True, eval_every=6, eval_bytes=2000, sample_every=6), workdir, engine.sample)
    assert done["step"] == STEPS and not done["stopped"] and done["seconds"] > 0
    return workdir


def told(workdir):
    return [{k: v for k, v in r.items() if k not in TIMES} for r in metrics.read(workdir)]


def assert_same_run(workdir, whole):
    assert told(workdir) == told(whole)
    for x, y in zip(*(jax.tree.leaves(load(path).params) for path in (workdir, whole)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_each_step_is_told_and_the_loss_falls(whole, text):
    t, records = ramped(text).train, metrics.read(whole)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in records] == [t.tokens_seen(step) for step in range(1, STEPS + 1)]
    total = records[-1]["tokens"]
    assert [r["lr"] for r in records] == [
        optim.learning_rate(t, step, t.tokens_seen(step) / total) for step in range(STEPS)]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert all(0 < r["drop_rate"] < 1 and r["tokens_per_s"] > 0 and r["grad_norm"] > 0 for r in records)
    assert all(r["bits_per_byte"] == pytest.approx(r["loss"] / np.log(2)) for r in records)


def test_tensorboard_has_the_run(whole):
    events = EventAccumulator(str(whole / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    losses = [(r["step"], pytest.approx(r["loss"])) for r in metrics.read(whole)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == losses
    validation = events.Scalars("validation/bits_per_byte")
    assert [e.step for e in validation] == [6, 12] and validation[1].value < validation[0].value
    samples = events.Tensors("sample/text_summary")
    assert [e.step for e in samples] == [6, 12]
    assert all(e.tensor_proto.string_val[0].startswith(b"The state of the Union") for e in samples)


def test_a_finished_run_is_left_as_it_is(whole, text, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("trained again")
    monkeypatch.setattr(train, "train_step", never)
    before = (whole / "metrics.jsonl").read_text()
    done = train.run(ramped(text), whole)
    assert (done["step"], done["stopped"]) == (STEPS, False)
    assert (whole / "metrics.jsonl").read_text() == before


def test_validation_drops_no_token(text, tmp_path, monkeypatch):
    seen = []

    def evaluator(model, *args, **kwargs):
        seen.append(model.config.capacity)
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "make_evaluator", evaluator)
    assert ramped(text).model.capacity == 1.0
    with pytest.raises(KeyboardInterrupt):
        train.run(ramped(text), tmp_path / "run")
    assert seen == [0.0]


def test_interrupted_anywhere_it_resumes_bit_by_bit(whole, text, tmp_path, monkeypatch):
    """Ctrl-C when the record of a random step is due; the loop lets nothing cross to the device unasked."""
    stop = random.randrange(2, STEPS + 1)
    print(f"stop at step {stop}")

    def report(*args):
        if args[4] == stop:
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                jnp.add(np.ones(3, np.float32), 1)
            raise KeyboardInterrupt
        return kept(*args)

    kept = train._report
    monkeypatch.setattr(train, "_report", report)
    with pytest.raises(KeyboardInterrupt):
        train.run(ramped(text), tmp_path / "run")
    monkeypatch.undo()
    assert [r["step"] for r in told(tmp_path / "run")] == list(range(1, stop))
    train.run(ramped(text), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_terminated_and_killed_it_resumes_bit_by_bit(whole, text, tmp_path, compiled_once):
    """SIGTERM saves the step under way and exits with 0; SIGKILL loses what is past the last checkpoint."""
    def run(step, signal):
        command = [sys.executable, "-c", DIE, config.to_json(ramped(text)), str(tmp_path), str(step), str(int(signal))]
        return subprocess.run(command, cwd=ROOT, env=os.environ | compiled_once, capture_output=True, text=True,
                              timeout=120)

    done = run(2, signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert "'step': 3," in done.stdout and "'stopped': 15" in done.stdout
    assert manager.find_step(tmp_path)[1].name == "3" and [r["step"] for r in told(tmp_path)] == [1, 2, 3]
    assert run(8, signal.SIGKILL).returncode == -signal.SIGKILL
    assert int(manager.find_step(tmp_path)[1].name) in (3, 5)       # 5 was being saved
    train.run(ramped(text), tmp_path)
    assert_same_run(tmp_path, whole)


def test_any_devices_give_the_losses_of_one(whole, text, tmp_path, monkeypatch):
    """Eight devices until SIGTERM, with an evaluation and a sample; two of another mesh go on."""
    def terminate(t, step, progress):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(t, step, progress)

    rate = optim.learning_rate
    monkeypatch.setattr(optim, "learning_rate", terminate)
    done = train.run(ramped(text, mesh={"ep": 2, "etp": 2, "seq": 2}, eval_every=4, eval_bytes=500, sample_every=4), tmp_path,
                     engine.sample)
    assert (done["step"], done["stopped"]) == (4, signal.SIGTERM)
    monkeypatch.undo()
    train.run(ramped(text, mesh={"edp": 2}), tmp_path)
    for one, many in zip(told(whole), told(tmp_path), strict=True):
        assert many.pop("layer_norms") == pytest.approx(one.pop("layer_norms"), rel=2e-3)      # kept in four digits
        assert many == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_a_run_starts_from_another_one_s_parameters(whole, text, tmp_path, monkeypatch):
    """From a workdir and from its Hugging Face form, on any mesh: the first loss is that of those parameters; where the run
    has a checkpoint it goes on from there, though the origin is gone."""
    origin, later = shutil.copytree(whole, tmp_path / "origin"), {"steps": 2, "seed": 1}
    convert.to_hf(whole, tmp_path / "hf", progress=False)
    e, params = experiment(text, **later), load(whole).params
    batch = pipeline.stream(e.data, e.train).next()
    want = jax.jit(functools.partial(losses.loss, Model(e.model), loss_chunk=e.train.loss_chunk))(params, batch)[1]["loss"]
    runs = {"from_hf": ("hf", {}), "mesh": ("origin/checkpoints/12", {"edp": 2}), "one": ("origin", {})}
    for name, (source, mesh) in runs.items():
        run = functools.partial(train.run, experiment(text, mesh=mesh, init_from=str(tmp_path / source), **later),
                                tmp_path / name)
        assert run()["new"] == 2
        first = metrics.read(tmp_path / name)[0]
        assert first["loss"] == pytest.approx(float(want), rel=1e-5) and first["step"] == 1
        assert first["lr"] == optim.learning_rate(e.train, 0, 0)
    shutil.rmtree(origin)
    assert run()["new"] == 0


def test_a_start_from_another_function_is_told(whole, text, tmp_path, capsys):
    """The shapes are the same, what they compute is not; how it is computed is no matter."""
    here = experiment(text, model={"rotary_dim": 2, "top_k": 1, "remat": True}, init_from=str(whole), steps=1, seed=1)
    train.run(here, tmp_path)
    there = experiment(text).model
    assert (f"was trained as another function: model.rotary_dim is {there.rotary_dim} there, 2 here, model.top_k is "
            f"{there.top_k} there, 1 here\n") in capsys.readouterr().err


def test_a_prompt_that_cannot_be_sampled_is_refused_at_once(text, tmp_path):
    """Not where the first sample is due."""
    numbers = experiment(text, sample_every=5, sample_prompt="12 and 13")
    numbers = dataclasses.replace(numbers, data=config.Data(sources=("mqar:vocab=200",), tokenizer="numbers:200"))
    with pytest.raises(ConfigError, match="^train.sample_prompt='12 and 13': text: 'and' is not a number below 200"):
        train.run(numbers, tmp_path / "run", engine.sample)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source, message", [
    ("nowhere", "is no directory"), ("", "neither a workdir"),
    ("whole", r"whole' does not hold the tensors of this model: it has misshapen embed_WD \[264, 16\] instead of \[264, 32\]")])
def test_a_start_that_does_not_fit_leaves_nothing_behind(source, message, whole, text, tmp_path):
    path = whole if source == "whole" else tmp_path / source
    with pytest.raises(ConfigError, match=message):
        train.run(experiment(text, model={"dim": 32}, init_from=str(path)), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def batch_of(micro_batches, rows, length=16):
    """Random tokens, few of the first micro-batch's targets counted."""
    rng, shape = np.random.default_rng(0), (micro_batches, rows, length)
    weights = np.ones(shape, np.float32)
    weights[0, :, 3:] = 0
    return {"tokens": rng.integers(264, size=shape), "targets": rng.integers(264, size=shape), "weights": weights,
            "segments": np.ones(shape, np.int32), "positions": np.broadcast_to(np.arange(length), shape)}


@functools.cache
def begun(**model):
    """Parameters, optimizer state and the step of a model."""
    model = Model(config.Model(**{**MODEL, "aux_weight": 0.0, **model}))
    optimizer = optim.adamw(config.Train())
    step = jax.jit(functools.partial(train.train_step, model=model, optimizer=optimizer, loss_chunk=64))
    return *jax.jit(functools.partial(train.init, model, optimizer, 0))(), step


def one_step(batch, **model):
    params, opt, step = begun(**model)
    return params, *step(params, opt, batch, np.float32(1e-4))


def test_micro_batches_equal_one_large_batch():
    """Where no token is dropped, and whatever share of the targets a micro-batch has."""
    parts = batch_of(4, 2)
    whole = {k: v.reshape(1, 8, 16) for k, v in parts.items()}
    (_, params, opt, one), (_, params_parts, opt_parts, four) = one_step(whole), one_step(parts)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(four[name], one[name], rtol=1e-5, err_msg=name)
    each = [one_step({k: v[n:n + 1] for k, v in parts.items()})[3] for n in range(4)]
    weights = [alone["targets"] for alone in each]
    assert weights == [6, 32, 32, 32]
    np.testing.assert_allclose(four["z_loss"], np.average([alone["z_loss"] for alone in each], weights=weights), rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-7), opt_parts, opt)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), params_parts, params)


def test_bfloat16_computes_over_float32_master_weights():
    before, after, opt, told = one_step(batch_of(1, 8), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves((after, opt)) if x.ndim} == {jnp.dtype("float32")}
    assert told["loss"].dtype == jnp.float32
    moved = np.abs(after["head_WD"] - before["head_WD"])
    assert 5e-5 < moved.max() < 2e-4 and (moved > 0).mean() > 0.9       # a bfloat16 weight of 1 moves by 4e-3 or not at all
    reference = one_step(batch_of(1, 8))[3]
    assert told["loss"] == pytest.approx(float(reference["loss"]), rel=0.02) and told["loss"] != reference["loss"]


def test_the_clock_ends_the_run_and_leads_its_rate(text, tmp_path, monkeypatch):
    """A second passes each time that the clock is read: twice a step."""
    def clock(start):
        ticks = iter(range(start, 10**6))
        monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(ticks)))

    def terminate(t, step, progress):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)      # Ctrl-C: saves as SIGTERM does
        return rate(t, step, progress)

    e, rate = experiment(text, steps=10**6, seconds=40.0, decay=0.5), optim.learning_rate
    monkeypatch.setattr(optim, "learning_rate", terminate)
    clock(0)
    done = train.run(e, tmp_path)
    assert done["stopped"] == signal.SIGINT and done["step"] == done["new"] == 6
    monkeypatch.setattr(optim, "learning_rate", rate)
    clock(1000)
    done = train.run(e, tmp_path)
    records = metrics.read(tmp_path)
    late = [0] * 6 + [1] * 13       # one more reading, of the loop that ended and saved
    assert not done["stopped"] and done["step"] == len(records) == 19 and done["new"] == 13 and done["seconds"] > 40
    assert [r["seconds"] for r in records] == [2 * step + late[step - 1] for step in range(1, 20)]
    assert [r["lr"] for r in records] == pytest.approx(
        [rate(e.train, step, (2 * step + 1 + late[step]) / 40) for step in range(19)])
    assert 0 < records[-1]["lr"] < 0.11 * max(r["lr"] for r in records)


@pytest.mark.parametrize("skips, last, told_of", [(0, 1, ""), (2, 3, ", as the 2 steps before it")])
def test_a_run_that_diverges_ends(skips, last, told_of, text, tmp_path):
    """At this rate step 2 has a finite loss, and a gradient that is no number, as all after it."""
    with pytest.raises(DivergedError, match=rf"^step {last + 1} has loss .*{told_of}: lower train.lr=1e\+30 or train.clip=1.0"
                       ) as caught:
        train.run(experiment(text, lr=1e30, warmup=0, every=1, guard={"skips": skips}), tmp_path)
    assert "\n" not in str(caught.value)
    assert manager.find_step(tmp_path)[1].name == str(last) and len(metrics.read(tmp_path)) == last
    assert metrics.read(tmp_path)[-1]["skipped"] == skips
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load(tmp_path).params))


def test_a_step_that_is_no_number_changes_nothing(text, tmp_path, monkeypatch):
    """Neither parameters nor optimizer; it is counted, and told as null."""
    batch = batch_of(1, 8)
    batch["weights"][0, 3, 3] = np.nan
    params, after, opt, _ = one_step(batch)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert not any(np.any(x) for x in jax.tree.leaves(opt))

    def next_(self):
        batch = given(self)
        if self._step in (3, 4):        # the fourth and fifth
            batch["weights"][0, 5] = np.nan
        return batch

    given = pipeline.Stream.next
    monkeypatch.setattr(pipeline.Stream, "next", next_)
    train.run(experiment(text, guard={"skips": 2}), tmp_path)
    records = metrics.read(tmp_path)
    assert [r["skipped"] for r in records] == [0] * 3 + [1] + [2] * 8
    assert [np.isfinite(r["loss"]) for r in records] == [True] * 3 + [False] * 2 + [True] * 7
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()
    assert records[-1]["loss"] < records[2]["loss"]


def test_a_spike_takes_the_run_back_and_its_data_are_left_out(text, tmp_path, monkeypatch, compiled_once):
    """Interrupted after it, the run ends the same; other data take the place of those lost, also in the ramp."""
    def run(name, stop=None):
        leap, read = iter([1e3]), []

        def learning_rate(t, step, progress):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(leap, rate(t, step, progress)) if step == 5 else rate(t, step, progress)

        def next_(self):
            read.append((self._step + (not self._left), self._micro))
            return given(self)

        monkeypatch.setattr(optim, "learning_rate", learning_rate)
        monkeypatch.setattr(pipeline.Stream, "next", next_)
        train.run(guarded, tmp_path / name)
        return read

    guarded = ramped(text, guard={"spike": 0.5, "window": 3, "beyond": 1}, every=4)
    rate, given = optim.learning_rate, pipeline.Stream.next
    read, records = run("whole"), metrics.read(tmp_path / "whole")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["rollbacks"] for r in records] == [0] * 4 + [1] * 8
    at = next(n for n, (step, _) in enumerate(read) if n and step < read[n - 1][0])     # back at the fifth step
    (steps, micros), (again, others) = zip(*read[:at]), zip(*read[at:])
    assert steps == (0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7) and micros == (*range(12), 10, 11)     # the seventh leapt
    assert again == (4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11) and others == tuple(range(12, 28))
    run("again", stop=9)
    assert len(metrics.read(tmp_path / "again")) == 10
    monkeypatch.setattr(optim, "learning_rate", rate)
    train.run(guarded, tmp_path / "again")
    assert_same_run(tmp_path / "again", tmp_path / "whole")


def test_a_run_of_another_config_is_refused(whole, text):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    with pytest.raises(ConfigError, match=r"another config: train.lr \(there 0.01, now 0.02\)"):
        train.run(ramped(text, lr=0.02), whole)
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_a_step_with_nothing_to_learn_is_no_mistake(text):
    """Rows that are parts of long prompts have no weights: no gradient, and no NaN."""
    t = experiment(text).train
    model, optimizer = Model(config.Model(**MODEL)), optim.adamw(t)
    zeros = {name: jnp.zeros((2, 2, 32), jnp.int32) for name in ("tokens", "targets", "segments", "positions")}
    params, opt = train.init(model, optimizer, 0)
    _, _, told = train.train_step(params, opt, zeros | {"weights": jnp.zeros((2, 2, 32))}, jnp.float32(1e-2), model=model,
                                  optimizer=optimizer, loss_chunk=t.loss_chunk)
    assert told["loss"] == 0 and np.isfinite(told["grad_norm"])
