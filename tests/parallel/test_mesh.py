"""The model on meshes of eight devices equals one device: loss, gradients, drops, 20 training steps, inference (float64)."""
import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmx import config
from mmx import mesh as meshes
from mmx.inference import engine
from mmx.model import Model, empty_cache
from mmx.parallel import sharding
from mmx.training import optim
from mmx.training.step import init, train_step

T, B = 32, 8
C = config.Model(vocab=40, dim=16, layers=2, pattern="LS", heads=8, kv_heads=2, head_dim=4, rotary_dim=2, experts=8,
                 expert_dim=8, capacity=0.75, z_weight=0.01, init="fan_in", embed_std=1.0, chunk=8, dtype="float64")
TRAIN = config.Train(batch=B, length=T, clip=0.0, loss_chunk=64)
STEPS = 20
PROMPTS, CHUNK, CACHE, NEW_TOKENS = (14, 5), 8, 24, 3        # lengths in tokens
# lengths of the documents of each row; they cross the shards of time, and the rest of a row is padding
ROWS = [(11, 21), (32,), (3, 1, 12, 9), (16, 16), (7, 8, 9, 8), (30,), (5,), (20, 4)]


def make(sizes, slices=1):
    return meshes.make(config.Experiment(C, TRAIN, mesh=config.Mesh(*sizes, slice=slices)))


def batch():
    rng, names = np.random.default_rng(0), ("tokens", "targets", "segments", "positions", "weights")
    arrays = {name: np.zeros((1, B, T), np.float64 if name == "weights" else np.int32) for name in names}
    arrays["tokens"][0], arrays["targets"][0] = rng.integers(0, C.vocab, (2, B, T))
    for b, row in enumerate(ROWS):
        for segment, (begin, n) in enumerate(zip(np.cumsum((0, *row)), row), 1):
            at = 0, b, slice(begin, begin + n)
            arrays["segments"][at], arrays["positions"][at], arrays["weights"][at] = segment, np.arange(n), 1
    return arrays


def steps(count, mesh=None, **changes):
    """Returns the metrics of `count` steps, the gradients of the first one, and the parameters. Meshes recompute layers."""
    model = Model(dataclasses.replace(C, remat=True, keep_arrived=True, token_groups=2, **changes) if mesh else C)
    optimizer = optim.adamw(TRAIN)
    step = functools.partial(train_step, model=model, optimizer=optimizer, train=TRAIN)
    params, opt, rows = *start(), batch()
    if mesh:
        shardings = sharding.param_shardings((params, opt), mesh)
        (params, opt), rows = jax.device_put((params, opt), shardings), jax.device_put(rows, sharding.batch_sharding(mesh, 1))
        step = jax.jit(step, out_shardings=(*shardings, sharding.replicated(mesh)))
    else:
        step = jax.jit(step)
    all_metrics = []
    for n in range(count):
        params, opt, metrics = step(params, opt, rows, np.float64(1e-2))
        all_metrics.append(jax.device_get(metrics))
        if n == 0:      # Adam's first moment after one step is a tenth of the gradient
            grads = jax.device_get(opt[1].mu)
    return all_metrics, grads, jax.device_get(params)


@functools.cache
def start():
    made = jax.jit(functools.partial(init, Model(C), optim.adamw(TRAIN), TRAIN))()
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.ndim else np.asarray(x), made)


@functools.cache
def one_device():
    return steps(STEPS)


def prefill_and_decode(lengths, mesh=None):
    """Prefills prompts of different lengths in chunks and decodes NEW_TOKENS; returns the logits and the cache."""
    model = Model(dataclasses.replace(C, capacity=0.0))
    params, cache = start()[0], empty_cache(model.config, len(lengths), CACHE)
    tokens_BT = np.random.default_rng(1).integers(0, C.vocab, (len(lengths), CACHE), np.int32)
    mask_BT = np.asarray(np.arange(CACHE) < np.array(lengths)[:, None], np.int32)
    prefill, decode = (functools.partial(f, model) for f in (engine.prefill, engine.decode_step))
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        if mesh:
            params = jax.device_put(params, sharding.param_shardings(params, mesh))
            shardings = sharding.cache_shardings(cache, mesh)
            cache = jax.device_put(cache, shardings)
            prefill, decode = jax.jit(prefill, out_shardings=shardings), jax.jit(decode, out_shardings=(None, shardings))
        else:
            prefill, decode = jax.jit(prefill), jax.jit(decode)
        for at in range(0, max(lengths), CHUNK):
            cache = prefill(params, tokens_BT[:, at:at + CHUNK], mask_BT[:, at:at + CHUNK], cache)
        logits = []
        for n in range(NEW_TOKENS):
            logits_BW, cache = decode(params, tokens_BT[:, n], cache)
            logits.append(logits_BW)
    # cache positions after a row's tokens may contain anything
    written_BS1 = (np.arange(CACHE) < np.array(lengths)[:, None] + NEW_TOKENS)[:, None, :, None]
    keys = {name: x * written_BS1 for name, x in jax.device_get(cache["layers"]["layer_1"]).items()}
    return jax.device_get((logits, cache["length_B"], cache["layers"]["layer_0"])) + (keys,)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_close(got, want, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


# sizes: of edp, ep, etp, seq; count: training steps
@pytest.mark.parametrize("sizes, count, slices", [
    ((1, 8, 1, 1), 1, 1), ((1, 1, 1, 8), 1, 1), ((4, 1, 2, 1), 1, 1), ((1, 2, 4, 1), 1, 1), ((2, 2, 2, 1), STEPS, 1),
    ((1, 2, 2, 2), STEPS, 1), ((2, 1, 2, 2), STEPS, 1), ((2, 2, 1, 1), STEPS, 2)], ids=str)
def test_any_mesh_equals_one_device(sizes, count, slices):
    want, want_grads, want_params = one_device()
    mesh = make(sizes, slices)
    with jax.set_mesh(mesh):
        got, grads, params = steps(count, mesh)
    assert (got[0]["dropped"] > 0.01).all() and (got[0]["overflow"] == 0).all()
    for name in ("load_E", "dropped"):
        np.testing.assert_allclose(got[0][name], want[0][name], rtol=1e-14, err_msg=name)     # one token more or less is 2e-3
    assert_close(grads, want_grads, 1e-10)
    for n in range(count):
        assert got[n]["loss"] == pytest.approx(want[n]["loss"], rel=1e-12 if n == 0 else 1e-9), n
    if count == STEPS:
        assert_close(params, want_params, 1e-9)


# shards rows, time, experts and heads; a chunk longer than a device's part of the cache; one row, so only experts are sharded
@pytest.mark.parametrize("sizes, lengths", [((1, 2, 2, 2), PROMPTS), ((1, 1, 2, 4), PROMPTS), ((1, 4, 2, 1), PROMPTS[:1])],
                         ids=str)
def test_prefill_and_decode_equal_one_device(sizes, lengths):
    mesh = make(sizes)
    want, got = prefill_and_decode(lengths), prefill_and_decode(lengths, mesh)
    assert_close(got, want, 1e-10)


def test_ragged_exchange_equals_one_device(ragged_on_cpu):
    want, want_grads, _ = one_device()
    mesh = make((2, 2, 2, 1))
    with jax.set_mesh(mesh):
        got, grads, _ = steps(1, mesh, ragged=True)
    for name in ("loss", "load_E", "dropped", "overflow"):
        np.testing.assert_allclose(got[0][name], want[0][name], rtol=1e-12, err_msg=name)
    assert_close(grads, want_grads, 1e-10)


@pytest.mark.parametrize("mesh, model, message", [
    ({"edp": 3}, {}, "^train.batch=8 must be divisible by mesh.edp=3$"),
    ({"edp": 2, "ep": 8}, {}, "^train.batch=8 must be divisible by mesh.edp=2 x mesh.ep=8$"),
    ({"slice": 3}, {}, "^train.batch=8 must be divisible by mesh.slice=3$"),
    ({"seq": 3}, {}, "^train.length=32 must be divisible by mesh.seq=3$"),
    ({"etp": 4}, {"heads": 6}, "^model.heads=6 must be divisible by mesh.etp=4$"),
    ({"etp": 8}, {"expert_dim": 12}, "^model.expert_dim=12 must be divisible by mesh.etp=8$"),
    ({"ep": 2}, {"ragged": True}, "^model.ragged=True needs TPUs or GPUs: CPUs have no ragged all-to-all"),
    ({"ep": 4}, {"experts": 6}, "^model.experts=6 must be divisible by mesh.ep=4$"),
    ({"edp": 8, "ep": 1, "etp": 2}, {}, "^mesh.edp=8, mesh.etp=2 needs 16 devices, but there are 8. Set one axis to -1"),
    ({"seq": 16}, {}, "^mesh.edp=-1, mesh.seq=16: the product of the other axes, 16, must divide the number of devices, 8$")])
def test_impossible_meshes_are_refused(mesh, model, message):
    experiment = config.Experiment(dataclasses.replace(C, **model), TRAIN, mesh=config.Mesh(**mesh))
    with pytest.raises(config.ConfigError, match=message):
        meshes.make(experiment)


@pytest.mark.parametrize("named, sizes", [
    ({}, (1, 8, 1, 1, 1)), ({"edp": 2}, (1, 2, 1, 1, 1)), ({"ep": 4}, (1, 2, 4, 1, 1)), ({"slice": 2}, (2, 4, 1, 1, 1)),
    ({"edp": 1, "seq": -1, "etp": 2}, (1, 1, 1, 2, 4))])
def test_free_axis_gets_the_remaining_devices(named, sizes):
    mesh = meshes.make(config.Experiment(C, TRAIN, mesh=config.Mesh(**named)))
    assert tuple(mesh.shape.items()) == tuple(zip(("slice", "edp", "ep", "etp", "seq"), sizes))


def test_cpu_devices_of_another_experiment_may_idle():
    """Of 8 devices, the mesh uses as many as divide the batch."""
    for batch, devices in ((6, 6), (5, 5), (7, 7), (9, 3), (11, 1)):
        mesh = meshes.make(config.Experiment(C, dataclasses.replace(TRAIN, batch=batch)))
        assert mesh.devices.size == devices
    assert meshes.make(config.Experiment(C, dataclasses.replace(TRAIN, length=33), mesh=config.Mesh(seq=3))).devices.size == 6
