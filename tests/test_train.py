"""Training runs: bit-exact resumption, one record for each step, the same losses on all meshes, guards."""
import dataclasses
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
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
from mmx.training import loop, metrics, optim, step
from mmx.training import loss as losses
from mmx.training import run as training
from mmx.training.guards import DivergedError
from mmx.training.run import train

pytestmark = pytest.mark.usefixtures("compiled_once")
ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "tokens_per_s", "flops_per_s", "data_wait"}
STEPS = 12
MODEL = {"dim": 16, "layers": 2, "pattern": "LS", "heads": 2, "kv_heads": 1, "head_dim": 8, "rotary_dim": 4, "experts": 4,
         "expert_dim": 16, "init": "fan_in", "embed_std": 1.0}
SIGNAL_AT_STEP = """
import os, sys
from mmx import config
from mmx.training import optim
from mmx.training.run import train
experiment, workdir, last, signal = config.from_json(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rate = optim.learning_rate
def learning_rate(t, step, progress):
    if step == last:
        os.kill(os.getpid(), signal)
    return rate(t, step, progress)
optim.learning_rate = learning_rate
print(train(experiment, workdir))
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
    """Steps of one micro-batch, and of two after 512 tokens."""
    return experiment(text, ramp=((0, 1), (512, 2)), **changes)


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """The workdir of an uninterrupted run with evaluations and samples."""
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    done = train(ramped(text, tensorboard=True, eval_every=6, eval_bytes=2000, sample_every=6), workdir, engine.sample)
    assert done["step"] == STEPS and not done["stopped"] and done["seconds"] > 0
    return workdir


def records(workdir):
    """metrics.jsonl without times and rates."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in metrics.read(workdir)]


def assert_same_run(workdir, uninterrupted):
    assert records(workdir) == records(uninterrupted)
    for x, y in zip(*(jax.tree.leaves(load(path).params) for path in (workdir, uninterrupted)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_each_step_has_a_record_and_the_loss_falls(uninterrupted, text):
    t, lines = ramped(text).train, metrics.read(uninterrupted)
    assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in lines] == [t.tokens_seen(step) for step in range(1, STEPS + 1)]
    total = lines[-1]["tokens"]
    assert [r["lr"] for r in lines] == [
        optim.learning_rate(t, step, t.tokens_seen(step) / total) for step in range(STEPS)]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert all(0 < r["drop_rate"] < 1 and r["tokens_per_s"] > 0 and r["grad_norm"] > 0 for r in lines)
    assert all(r["bits_per_byte"] == pytest.approx(r["loss"] / np.log(2)) for r in lines)


def test_tensorboard_has_the_run(uninterrupted):
    events = EventAccumulator(str(uninterrupted / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    losses = [(r["step"], pytest.approx(r["loss"])) for r in metrics.read(uninterrupted)]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == losses
    validation = events.Scalars("validation/bits_per_byte")
    assert [e.step for e in validation] == [6, 12] and validation[1].value < validation[0].value
    samples = events.Tensors("sample/text_summary")
    assert [e.step for e in samples] == [6, 12]
    assert all(e.tensor_proto.string_val[0].startswith(b"The state of the Union") for e in samples)


def test_a_finished_run_stays_unchanged(uninterrupted, text, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("trained again")
    monkeypatch.setattr(step, "train_step", fail)
    before = (uninterrupted / "metrics.jsonl").read_text()
    done = train(ramped(text), uninterrupted)
    assert (done["step"], done["stopped"]) == (STEPS, False)
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_validation_drops_no_token(text, tmp_path, monkeypatch):
    capacities = []

    def evaluator(model, *args, **kwargs):
        capacities.append(model.config.capacity)
        raise KeyboardInterrupt
    monkeypatch.setattr(training, "make_evaluator", evaluator)
    assert ramped(text).model.capacity == 1.0
    with pytest.raises(KeyboardInterrupt):
        train(ramped(text), tmp_path / "run")
    assert capacities == [0.0]


def test_an_interrupted_run_resumes_bit_by_bit(uninterrupted, text, tmp_path, monkeypatch):
    """Ctrl-C before the record of a random step. The loop forbids implicit transfers to the device."""
    last = random.randrange(2, STEPS + 1)
    print(f"interrupted at step {last}")

    def interrupt(run, done):
        if done.step == last:
            with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
                jnp.add(np.ones(3, np.float32), 1)
            raise KeyboardInterrupt
        return report(run, done)

    report = loop.report
    monkeypatch.setattr(loop, "report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(ramped(text), tmp_path / "run")
    monkeypatch.undo()
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, last))
    train(ramped(text), tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_killed_run_resumes_bit_by_bit(uninterrupted, text, tmp_path, compiled_once):
    """SIGTERM saves the current step and exits with 0. SIGKILL loses the steps after the last checkpoint."""
    def run(step, signal):
        arguments = map(str, (config.to_json(ramped(text)), tmp_path, step, int(signal)))
        return subprocess.run([sys.executable, "-c", SIGNAL_AT_STEP, *arguments], cwd=ROOT, env=os.environ | compiled_once,
                              capture_output=True, text=True, timeout=120)

    done = run(2, signal.SIGTERM)
    assert done.returncode == 0, done.stderr
    assert "'step': 3," in done.stdout and "'stopped': 15" in done.stdout
    assert manager.find_step(tmp_path)[1].name == "3" and [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    assert run(8, signal.SIGKILL).returncode == -signal.SIGKILL
    assert int(manager.find_step(tmp_path)[1].name) in (3, 5)       # 5, if its save was complete
    train(ramped(text), tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_all_meshes_give_the_losses_of_one_device(uninterrupted, text, tmp_path, monkeypatch):
    """Eight devices train until SIGTERM, with an evaluation and a sample; two devices of another mesh resume."""
    def terminate(t, step, progress):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(t, step, progress)

    rate = optim.learning_rate
    monkeypatch.setattr(optim, "learning_rate", terminate)
    done = train(ramped(text, mesh={"ep": 2, "etp": 2, "seq": 2}, eval_every=4, eval_bytes=500, sample_every=4), tmp_path,
                     engine.sample)
    assert (done["step"], done["stopped"]) == (4, signal.SIGTERM)
    monkeypatch.undo()
    train(ramped(text, mesh={"edp": 2}), tmp_path)
    for one, many in zip(records(uninterrupted), records(tmp_path), strict=True):
        assert many.pop("layer_norms") == pytest.approx(one.pop("layer_norms"), rel=2e-3)      # four digits
        assert many == pytest.approx(one, rel=1e-5, abs=1e-7)


def test_a_run_starts_from_the_parameters_of_another(uninterrupted, text, tmp_path, monkeypatch):
    """From a workdir or its Hugging Face form, on any mesh. A run with a checkpoint resumes without the other run."""
    origin, changes = shutil.copytree(uninterrupted, tmp_path / "origin"), {"steps": 2, "seed": 1}
    convert.to_hf(uninterrupted, tmp_path / "hf", progress=False)
    e, params = experiment(text, **changes), load(uninterrupted).params
    batch = pipeline.stream(e.data, e.train).next()
    expected = jax.jit(functools.partial(losses.loss, Model(e.model), loss_chunk=e.train.loss_chunk))(params, batch)[1]["loss"]
    runs = {"from_hf": ("hf", {}), "mesh": ("origin/checkpoints/12", {"edp": 2}), "one": ("origin", {})}
    for name, (source, mesh) in runs.items():
        run = functools.partial(train, experiment(text, mesh=mesh, init_from=str(tmp_path / source), **changes),
                                tmp_path / name)
        assert run()["new"] == 2
        first = metrics.read(tmp_path / name)[0]
        assert first["loss"] == pytest.approx(float(expected), rel=1e-5) and first["step"] == 1
        assert first["lr"] == optim.learning_rate(e.train, 0, 0)
    shutil.rmtree(origin)
    assert run()["new"] == 0


def test_other_settings_of_the_first_model_are_reported(uninterrupted, text, tmp_path, capsys):
    """Settings that change the function of the model, but not its shapes; model.remat changes neither."""
    e = experiment(text, model={"rotary_dim": 2, "top_k": 1, "remat": True}, init_from=str(uninterrupted), steps=1, seed=1)
    train(e, tmp_path)
    before = experiment(text).model
    assert (f"was trained with other settings: model.rotary_dim is {before.rotary_dim} there, 2 here, model.top_k is "
            f"{before.top_k} there, 1 here\n") in capsys.readouterr().err


def test_a_sample_prompt_that_does_not_encode_is_refused_at_once(text, tmp_path):
    """Before training, not at the first sample."""
    numbers = experiment(text, sample_every=5, sample_prompt="12 and 13")
    numbers = dataclasses.replace(numbers, data=config.Data(sources=("mqar:vocab=200",), tokenizer="numbers:200"))
    with pytest.raises(ConfigError, match="^train.sample_prompt='12 and 13': text: 'and' is not a number below 200"):
        train(numbers, tmp_path / "run", engine.sample)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source, message", [
    ("nowhere", "is not a directory"), ("", "neither a workdir"),
    ("uninterrupted", r"uninterrupted' does not contain the tensors of this model: it has misshapen embed_WD \[264, 16\] "
                      r"instead of \[264, 32\]")])
def test_a_misfit_of_init_from_writes_nothing(source, message, uninterrupted, text, tmp_path):
    path = uninterrupted if source == "uninterrupted" else tmp_path / source
    with pytest.raises(ConfigError, match=message):
        train(experiment(text, model={"dim": 32}, init_from=str(path)), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def batch_of(micro_batches, rows, length=16):
    """Random tokens. Few targets of the first micro-batch count."""
    rng, shape = np.random.default_rng(0), (micro_batches, rows, length)
    weights = np.ones(shape, np.float32)
    weights[0, :, 3:] = 0
    return {"tokens": rng.integers(264, size=shape), "targets": rng.integers(264, size=shape), "weights": weights,
            "segments": np.ones(shape, np.int32), "positions": np.broadcast_to(np.arange(length), shape)}


@functools.cache
def initial(**model):
    """Parameters, optimizer state and the jitted step of a model."""
    model = Model(config.Model(**{**MODEL, "aux_weight": 0.0, **model}))
    optimizer = optim.adamw(config.Train())
    t = config.Train(loss_chunk=64)
    update = jax.jit(functools.partial(step.train_step, model=model, optimizer=optimizer, train=t))
    return *jax.jit(functools.partial(step.init, model, optimizer, t))(), update


def one_step(batch, **model):
    params, opt, update = initial(**model)
    return params, *update(params, opt, batch, np.float32(1e-4))


@pytest.mark.case(21)
def test_a_run_in_a_thread(text, tmp_path, monkeypatch):
    """As in a web worker. There is no stderr, and signal handlers stay as they are."""
    before, done = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(sys, "stderr", None)
    thread = threading.Thread(target=lambda: done.append(train(experiment(text, steps=3), tmp_path / "thread")))
    thread.start()
    thread.join()
    assert done[0]["step"] == 3 and signal.getsignal(signal.SIGTERM) == before
    train(experiment(text, steps=3), tmp_path / "main")
    assert records(tmp_path / "thread") == records(tmp_path / "main")


def test_micro_batches_equal_one_large_batch():
    """Without dropped tokens, for any share of the targets in each micro-batch."""
    parts = batch_of(4, 2)
    batch = {k: v.reshape(1, 8, 16) for k, v in parts.items()}
    (_, params, opt, one), (_, params_parts, opt_parts, four) = one_step(batch), one_step(parts)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(four[name], one[name], rtol=1e-5, err_msg=name)
    singles = [one_step({k: v[n:n + 1] for k, v in parts.items()})[3] for n in range(4)]
    weights = [single["target_count"] for single in singles]
    assert weights == [6, 32, 32, 32]
    np.testing.assert_allclose(four["z_loss"], np.average([single["z_loss"] for single in singles], weights=weights), rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-7), opt_parts, opt)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), params_parts, params)


def test_bfloat16_computes_over_float32_master_weights():
    before, after, opt, found = one_step(batch_of(1, 8), dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves((after, opt)) if x.ndim} == {jnp.dtype("float32")}
    assert found["loss"].dtype == jnp.float32
    change = np.abs(after["head_WD"] - before["head_WD"])
    assert 5e-5 < change.max() < 2e-4 and (change > 0).mean() > 0.9       # bfloat16 next to 1 has steps of 4e-3
    reference = one_step(batch_of(1, 8))[3]
    assert found["loss"] == pytest.approx(float(reference["loss"]), rel=0.02) and found["loss"] != reference["loss"]


def test_with_train_seconds_the_clock_sets_the_rate_and_the_end(text, tmp_path, monkeypatch):
    """A fake clock advances by a second each time that it is read: twice in a step."""
    def clock(start):
        ticks = iter(range(start, 10**6))
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks)))

    def terminate(t, step, progress):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)      # Ctrl-C saves like SIGTERM
        return rate(t, step, progress)

    e, rate = experiment(text, steps=10**6, seconds=40.0, decay=0.5), optim.learning_rate
    monkeypatch.setattr(optim, "learning_rate", terminate)
    clock(0)
    done = train(e, tmp_path)
    assert done["stopped"] == signal.SIGINT and done["step"] == done["new"] == 6
    monkeypatch.setattr(optim, "learning_rate", rate)
    clock(1000)
    done = train(e, tmp_path)
    lines = metrics.read(tmp_path)
    late = [0] * 6 + [1] * 13       # the clock was read once more when the first loop ended
    assert not done["stopped"] and done["step"] == len(lines) == 19 and done["new"] == 13 and done["seconds"] > 40
    assert [r["seconds"] for r in lines] == [2 * step + late[step - 1] for step in range(1, 20)]
    assert [r["lr"] for r in lines] == pytest.approx(
        [rate(e.train, step, (2 * step + 1 + late[step]) / 40) for step in range(19)])
    assert 0 < lines[-1]["lr"] < 0.11 * max(r["lr"] for r in lines)


@pytest.mark.parametrize("skips, last, reason", [(0, 1, ""), (2, 3, ", and the 2 steps before it were skipped too")])
def test_a_run_that_diverges_ends(skips, last, reason, text, tmp_path):
    """At this learning rate step 2 has a finite loss, but its gradient and all later ones are not finite."""
    with pytest.raises(DivergedError, match=rf"^step {last + 1} has loss .*{reason}: a resumed run .* \(train.lr is 1e\+30\)"
                       ) as caught:
        train(experiment(text, lr=1e30, warmup=0, every=1, guard={"skips": skips}), tmp_path)
    assert "\n" not in str(caught.value)
    assert manager.find_step(tmp_path)[1].name == str(last) and len(metrics.read(tmp_path)) == last
    assert metrics.read(tmp_path)[-1]["skipped"] == skips
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load(tmp_path).params))


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_parameters_that_are_not_finite_are_not_saved(bad):
    saved = []
    checkpoints = SimpleNamespace(save=lambda *args, **options: saved.append(args))
    run = SimpleNamespace(log=SimpleNamespace(flush=lambda: None), checkpoints=checkpoints)
    with pytest.raises(DivergedError, match="a parameter is nan or infinite after step 7, which is not saved"):
        loop.save(run, 7, {"a": np.ones(3, np.float32), "b": np.array([[1, bad]], np.float32)}, (), 1.0, force=True)
    assert not saved


def test_a_nonfinite_step_changes_nothing(text, tmp_path, monkeypatch):
    """Neither parameters nor optimizer state. It is counted, and its loss is null in metrics.jsonl."""
    batch = batch_of(1, 8)
    batch["weights"][0, 3, 3] = np.nan
    params, after, opt, _ = one_step(batch)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    assert not any(np.any(x) for x in jax.tree.leaves(opt))

    def next_(self):
        batch = original(self)
        if self._step in (3, 4):        # the fourth and the fifth step
            batch["weights"][0, 5] = np.nan
        return batch

    original = pipeline.Stream.next
    monkeypatch.setattr(pipeline.Stream, "next", next_)
    train(experiment(text, guard={"skips": 2}), tmp_path)
    lines = metrics.read(tmp_path)
    assert [r["skipped"] for r in lines] == [0] * 3 + [1] + [2] * 8
    assert [np.isfinite(r["loss"]) for r in lines] == [True] * 3 + [False] * 2 + [True] * 7
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()
    assert lines[-1]["loss"] < lines[2]["loss"]


def test_a_spike_rolls_the_run_back_and_discards_its_data(text, tmp_path, monkeypatch, compiled_once):
    """New data replace the discarded data, in the batch ramp too. A run interrupted after the rollback ends the same."""
    def run(name, last=None):
        spikes, read = iter([1e3]), []

        def learning_rate(t, step, progress):
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(spikes, rate(t, step, progress)) if step == 5 else rate(t, step, progress)

        def next_(self):
            read.append((self._step + (not self._remaining), self._micro))
            return original(self)

        monkeypatch.setattr(optim, "learning_rate", learning_rate)
        monkeypatch.setattr(pipeline.Stream, "next", next_)
        train(guarded, tmp_path / name)
        return read

    guarded = ramped(text, guard={"spike": 0.5, "window": 3, "beyond": 1}, every=4)
    rate, original = optim.learning_rate, pipeline.Stream.next
    read, lines = run("uninterrupted"), metrics.read(tmp_path / "uninterrupted")
    assert [r["step"] for r in lines] == list(range(1, STEPS + 1))
    assert [r["rollbacks"] for r in lines] == [0] * 4 + [1] * 8
    rollback = next(n for n, (step, _) in enumerate(read) if n and step < read[n - 1][0])
    (steps, micros), (steps_after, micros_after) = zip(*read[:rollback]), zip(*read[rollback:])
    assert steps == (0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7) and micros == (*range(12), 10, 11)     # step 7 is the spike
    assert steps_after == (4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11)
    assert micros_after == tuple(range(12, 28))
    run("again", last=9)
    assert len(metrics.read(tmp_path / "again")) == 10
    monkeypatch.setattr(optim, "learning_rate", rate)
    train(guarded, tmp_path / "again")
    assert_same_run(tmp_path / "again", tmp_path / "uninterrupted")


def test_another_config_is_refused(uninterrupted, text):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    with pytest.raises(ConfigError, match=r"another config: train.lr \(there 0.01, now 0.02\)"):
        train(ramped(text, lr=0.02), uninterrupted)
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == before


def test_a_step_without_targets_is_finite(text):
    """Rows that are parts of long prompts have weights of 0 only."""
    t = experiment(text).train
    model, optimizer = Model(config.Model(**MODEL)), optim.adamw(t)
    zeros = {name: jnp.zeros((2, 2, 32), jnp.int32) for name in ("tokens", "targets", "segments", "positions")}
    params, opt = step.init(model, optimizer, t)
    _, _, found = step.train_step(params, opt, zeros | {"weights": jnp.zeros((2, 2, 32))}, jnp.float32(1e-2), model=model,
                                  optimizer=optimizer, train=t)
    assert found["loss"] == 0 and np.isfinite(found["grad_norm"])
