"""Splash attention behind our contract: interpreted against the full score matrix, and through the TPU's compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from test_attention import assert_close, inputs, oracle, segments

from mmx.compilers import schedule
from mmx.kernels import platform
from mmx.kernels.attention import softmax_attention, tpu


@jax.jit
def interpreted(args, do, segments_BT):
    o, pull = jax.vjp(lambda *args: tpu.attention(*args, segments_BT, segments_BT, interpret=True), *args)
    return o, *pull(do)


@pytest.mark.parametrize("kind", [None, "holes"])
def test_against_the_full_matrix(kind):
    args, do = inputs(4, 2, 256, B=1, K=128, V=128)
    segments_BT = segments(kind, 1, 256)
    got = [np.asarray(x, np.float64) for x in interpreted(args, do, segments_BT)]
    assert_close(got, oracle(args, do, segments_BT, segments_BT))


def test_refusals_say_why(monkeypatch):
    args, _ = inputs(2, 1, 128, K=128, V=128, B=1)
    with pytest.raises(NotImplementedError, match="impl='tpu': this computation is for cpu"):
        softmax_attention(*args, impl="tpu")
    monkeypatch.setattr(platform, "name", lambda: "tpu")
    with pytest.raises(NotImplementedError, match="T=100, K=128, V=128: splash attention takes multiples of 128"):
        softmax_attention(*(x[:, :, :100] for x in args), impl="tpu")
    with pytest.raises(NotImplementedError, match="of a cache"):
        softmax_attention(*args, start_B=jnp.zeros(1, jnp.int32), impl="tpu")


@pytest.mark.skipif(bool(schedule.missing()), reason=schedule.missing())
def test_is_picked_and_compiles_for_v5p(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))
    q, k, segments_BT = array(1, 4, 512, 128), array(1, 2, 512, 128), array(1, 512, dtype=jnp.int32)
    loss = lambda q, k, v, s: softmax_attention(q, k, v, segments_BT=s).astype(jnp.float32).sum()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segments_BT).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
