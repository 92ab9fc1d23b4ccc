"""The model on meshes of eight devices against one: loss, gradients, drops, twenty steps of training, inference, in float64."""
import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from mmx import config
from mmx.inference import engine
from mmx.model import Model
from mmx.parallel import mesh as meshes
from mmx.parallel import sharding
from mmx.parallel.cache import empty_cache
from mmx.training import optim
from mmx.training.step import init, train_step

T, B = 32, 8
C = config.Model(vocab=40, dim=16, layers=2, pattern="LS", heads=8, kv_heads=2, head_dim=4, rotary_dim=2, experts=8,
                 expert_dim=8, capacity=0.75, z_weight=0.01, init="fan_in", embed_std=1.0, chunk=8, dtype="float64")
TRAIN = config.Train(batch=B, length=T, clip=0.0, loss_chunk=64)
STEPS = 20
PROMPTS, CHUNK, CAPACITY, STEPS_BEHIND = (14, 5), 8, 24, 3
# rows of documents that end anywhere, across the cuts of time, and padding behind them
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
    """`count` steps from the same start: each one's metrics, and the first one's gradients. Layers on a mesh are recomputed."""
    model = Model(dataclasses.replace(C, remat=True, keep_arrived=True, token_groups=2, **changes) if mesh else C)
    optimizer = optim.adamw(TRAIN)
    step = functools.partial(train_step, model=model, optimizer=optimizer, train=TRAIN)
    params, opt, rows = *start(), batch()
    if mesh:
        kept = sharding.tree((params, opt), mesh)
        (params, opt), rows = jax.device_put((params, opt), kept), jax.device_put(rows, sharding.batch(mesh, 1))
        step = jax.jit(step, out_shardings=(*kept, sharding.whole(mesh)))
    else:
        step = jax.jit(step)
    told = []
    for n in range(count):
        params, opt, metrics = step(params, opt, rows, np.float64(1e-2))
        told.append(jax.device_get(metrics))
        if n == 0:      # Adam's first moment after one step is the gradient's tenth
            grads = jax.device_get(opt[1].mu)
    return told, grads, jax.device_get(params)


@functools.cache
def start():
    made = jax.jit(functools.partial(init, Model(C), optim.adamw(TRAIN), TRAIN))()
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if x.ndim else np.asarray(x), made)


@functools.cache
def one_device():
    return steps(STEPS)


def read_and_go_on(lengths, mesh=None):
    """Logits of STEPS_BEHIND tokens behind ragged prompts that were read in chunks, and the cache."""
    model = Model(dataclasses.replace(C, capacity=0.0))
    params, cache = start()[0], empty_cache(model.config, len(lengths), CAPACITY)
    tokens_BT = np.random.default_rng(1).integers(0, C.vocab, (len(lengths), CAPACITY), np.int32)
    mask_BT = np.asarray(np.arange(CAPACITY) < np.array(lengths)[:, None], np.int32)
    read, go_on = (functools.partial(f, model) for f in (engine.prefill, engine.decode_step))
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        if mesh:
            params = jax.device_put(params, sharding.tree(params, mesh))
            kept = sharding.cache(cache, mesh)
            cache = jax.device_put(cache, kept)
            read, go_on = jax.jit(read, out_shardings=kept), jax.jit(go_on, out_shardings=(None, kept))
        else:
            read, go_on = jax.jit(read), jax.jit(go_on)
        for at in range(0, max(lengths), CHUNK):
            cache = read(params, tokens_BT[:, at:at + CHUNK], mask_BT[:, at:at + CHUNK], cache)
        told = []
        for n in range(STEPS_BEHIND):
            logits_BW, cache = go_on(params, tokens_BT[:, n], cache)
            told.append(logits_BW)
    # what stands behind a row's tokens is nobody's
    seen_BS1 = (np.arange(CAPACITY) < np.array(lengths)[:, None] + STEPS_BEHIND)[:, None, :, None]
    keys = {name: x * seen_BS1 for name, x in jax.device_get(cache["layers"]["layer_1"]).items()}
    return jax.device_get((told, cache["length_B"], cache["layers"]["layer_0"])) + (keys,)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_close(got, want, tolerance):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        error = np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


# edp, ep, etp, seq; how many steps; slices
@pytest.mark.parametrize("sizes, count, slices", [
    ((1, 8, 1, 1), 1, 1), ((1, 1, 1, 8), 1, 1), ((4, 1, 2, 1), 1, 1), ((1, 2, 4, 1), 1, 1), ((2, 2, 2, 1), STEPS, 1),
    ((1, 2, 2, 2), STEPS, 1), ((2, 1, 2, 2), STEPS, 1), ((2, 2, 1, 1), STEPS, 2)], ids=str)
def test_any_mesh_equals_one_device(sizes, count, slices):
    want, want_grads, want_params = one_device()
    mesh = make(sizes, slices)
    with jax.set_mesh(mesh):
        told, grads, params = steps(count, mesh)
    assert (told[0]["dropped"] > 0.01).all() and (told[0]["overflow"] == 0).all()
    for name in ("load_E", "dropped"):
        np.testing.assert_allclose(told[0][name], want[0][name], rtol=1e-14, err_msg=name)     # one token is 2e-3
    assert_close(grads, want_grads, 1e-10)
    for n in range(count):
        assert told[n]["loss"] == pytest.approx(want[n]["loss"], rel=1e-12 if n == 0 else 1e-9), n
    if count == STEPS:
        assert_close(params, want_params, 1e-9)


# rows, time, experts and heads are cut; a chunk is longer than the cache's part on a device; one row, experts on their own
@pytest.mark.parametrize("sizes, lengths", [((1, 2, 2, 2), PROMPTS), ((1, 1, 2, 4), PROMPTS), ((1, 4, 2, 1), PROMPTS[:1])],
                         ids=str)
def test_prompts_in_chunks_and_the_tokens_behind_them(sizes, lengths):
    mesh = make(sizes)
    want, got = read_and_go_on(lengths), read_and_go_on(lengths, mesh)
    assert_close(got, want, 1e-10)


def test_ragged_exchange_equals_one_device(ragged_on_cpu):
    want, want_grads, _ = one_device()
    mesh = make((2, 2, 2, 1))
    with jax.set_mesh(mesh):
        told, grads, _ = steps(1, mesh, ragged=True)
    for name in ("loss", "load_E", "dropped", "overflow"):
        np.testing.assert_allclose(told[0][name], want[0][name], rtol=1e-12, err_msg=name)
    assert_close(grads, want_grads, 1e-10)


@pytest.mark.parametrize("mesh, model, message", [
    ({"edp": 3}, {}, "^train.batch=8 does not split over mesh.edp=3 devices$"),
    ({"edp": 2, "ep": 8}, {}, "^train.batch=8 does not split over mesh.edp=2 x mesh.ep=8 devices$"),
    ({"slice": 3}, {}, "^train.batch=8 does not split over mesh.slice=3 devices$"),
    ({"seq": 3}, {}, "^train.length=32 does not split over mesh.seq=3 devices$"),
    ({"etp": 4}, {"heads": 6}, "^model.heads=6 does not split over mesh.etp=4 devices$"),
    ({"etp": 8}, {"expert_dim": 12}, "^model.expert_dim=12 does not split over mesh.etp=8 devices$"),
    ({"ep": 2}, {"ragged": True}, "^model.ragged=True needs TPUs or GPUs: CPUs have no ragged all-to-all"),
    ({"ep": 4}, {"experts": 6}, "^model.experts=6 does not split over mesh.ep=4 devices$"),
    ({"edp": 8, "ep": 1, "etp": 2}, {}, "^mesh.edp=8, mesh.etp=2 needs 16 devices, but 8 devices are here; -1 on one"),
    ({"seq": 16}, {}, "^mesh.edp=-1, mesh.seq=16: the other axes' product 16 does not divide the 8 devices here$")])
def test_meshes_that_cannot_be(mesh, model, message):
    experiment = config.Experiment(dataclasses.replace(C, **model), TRAIN, mesh=config.Mesh(**mesh))
    with pytest.raises(config.ConfigError, match=message):
        meshes.make(experiment)


@pytest.mark.parametrize("named, sizes", [
    ({}, (1, 8, 1, 1, 1)), ({"edp": 2}, (1, 2, 1, 1, 1)), ({"ep": 4}, (1, 2, 4, 1, 1)), ({"slice": 2}, (2, 4, 1, 1, 1)),
    ({"edp": 1, "seq": -1, "etp": 2}, (1, 1, 1, 2, 4))])
def test_a_mesh_takes_what_it_names_and_one_axis_the_rest(named, sizes):
    mesh = meshes.make(config.Experiment(C, TRAIN, mesh=config.Mesh(**named)))
    assert tuple(mesh.shape.items()) == tuple(zip(("slice", "edp", "ep", "etp", "seq"), sizes))


def test_devices_made_for_another_experiment_may_idle():
    """Of 8, as many as the batch splits over."""
    for batch, devices in ((6, 6), (5, 5), (7, 7), (9, 3), (11, 1)):
        mesh = meshes.make(config.Experiment(C, dataclasses.replace(TRAIN, batch=batch)))
        assert mesh.devices.size == devices
    assert meshes.make(config.Experiment(C, dataclasses.replace(TRAIN, length=33), mesh=config.Mesh(seq=3))).devices.size == 6
