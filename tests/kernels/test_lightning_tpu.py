"""The TPU kernel of lightning attention: in interpreters against the token recurrence, and through the TPU's compiler."""
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from test_lightning import assert_close, inputs, segments

from mmx.kernels.lightning import reference, tpu

TOPOLOGY = "v5p:2x2x1"


def problem(T, kind, dtype, slopes=(1.0, 4e-8), B=3):
    """The shared arguments of forward and backward, the cotangents, and what the recurrence makes of them."""
    args, cotangents, log_decay_H = inputs(B, 4, T, 8, 12, dtype, slopes)
    segments_BT = segments(kind, B, T)
    want = oracle(args, cotangents, log_decay_H, np.ones((B, T), np.int32) if segments_BT is None else segments_BT)
    return (*args[:3], log_decay_H, segments_BT, args[3]), cotangents, want


def oracle(*args):
    """The recurrence in float64: in float32 its own decay is off by 1e-5 after 1,024 tokens."""
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x) if x.dtype == jnp.int32 else np.asarray(x, np.float64)
        return jax.tree.map(np.asarray, recurrence(*jax.tree.map(wide, args)))


@jax.jit
def recurrence(args, cotangents, log_decay_H, segments_BT):
    out, pull = jax.vjp(lambda q, k, v, s: reference.lightning_attention(q, k, v, log_decay_H, segments_BT, s), *args)
    return out + pull(cotangents)


@functools.partial(jax.jit, static_argnames="chunk")
def kernels(shared, cotangents, chunk):
    return *tpu.forward(*shared, chunk, interpret=True), *tpu.backward(*shared, *cotangents, chunk, interpret=True)


@pytest.mark.parametrize("T, kind, chunk, dtype", [
    (1, "one", None, "float32"), (17, "many", 16, "bfloat16"), (128, "edges", 32, "float32"), (300, "one", 64, "float32"),
    (300, "many", 64, "float32"), (300, "left", 64, "float32"), (300, "right", 64, "float32"), (300, "holes", 64, "float32"),
    (300, "holes", 64, "bfloat16"), (1024, "holes", None, "float32")])
def test_against_recurrence(T, kind, chunk, dtype):
    shared, cotangents, want = problem(T, kind, dtype)
    assert_close(kernels(shared, cotangents, chunk), want, dtype)


def test_no_races_and_nothing_uninitialized():
    """One pass at a time, waited for: the race detector's memory is one for the process."""
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    (q, k, v, g, segments_BT, state), (do, dstate), want = problem(20, "many", "float32", B=1)
    up = jax.block_until_ready(tpu.forward(q, k, v, g, segments_BT, state, 16, interpret=interpret))
    assert not interpret_pallas_call.races.races_found
    assert_close(up, want[:2], "float32")
    (dv, dk), ds = jax.block_until_ready(tpu._scan((k, v), q, do, g, segments_BT, dstate, 16, True, interpret))
    assert not interpret_pallas_call.races.races_found
    assert_close((dk, dv, ds), want[3:], "float32")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")
@pytest.mark.parametrize("T, segmented", [(512, False), (300, True)])
def test_compiles_for_v5p(T, segmented, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    x, state = array((1, 4, T, 128), jnp.bfloat16), array((1, 4, 128, 128), jnp.float32)
    segments_BT = array((1, T), jnp.int32) if segmented else None

    def passes(q, k, v, g, seg, state, do, dstate):
        shared = q, k, v, g, seg, state
        return tpu.forward(*shared), tpu.backward(*shared, do, dstate)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(passes).lower(x, x, x, array((4,), jnp.float32), segments_BT, state, x, state).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
