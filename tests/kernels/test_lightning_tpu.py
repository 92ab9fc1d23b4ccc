"""Tests the TPU kernel of lightning attention for races and uninitialized memory, and compiles it for a TPU."""
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from lightning_cases import NAMES, TOLERANCE, case

from mmx.kernels.lightning import tpu

TOPOLOGY = "v5p:2x2x1"


@pytest.mark.parametrize("names, dtype, segmented", [
    (("o", "state"), "float32", True), (("dq",), "float32", True), (("dv", "dk", "dstate"), "float32", True),
    (("o", "state"), "bfloat16", False), (("dv", "dk", "dstate"), "bfloat16", False)])
def test_no_races_and_nothing_uninitialized(names, dtype, segmented):
    """Runs one pass at a time and waits for it, because the race detector keeps one global state."""
    (q, k, v, state), (do, dstate), g, segments_BT, want = case(20, 16, 32, dtype, segmented, slopes=(1.0, 0.0))
    passes = {"o": ((q,), k, v, state, False), "dq": ((do,), v, k, jnp.einsum("BHKV->BHVK", state), False),
              "dv": ((k, v), q, do, dstate, True)}
    queries, keys, values, start, reverse = passes[names[0]]
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    got, last = jax.block_until_ready(tpu._scan(queries, keys, values, g, segments_BT, start, 16, reverse, interpret))
    assert not interpret_pallas_call.races.races_found
    got, want = dict(zip(names, [*got, last])), dict(zip(NAMES, want))
    for name in names:
        error = np.linalg.norm(np.asarray(got[name], np.float64) - want[name]) / np.linalg.norm(want[name])
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.1e}"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("T, segmented", [(512, False), (300, True)])
def test_compiles_for_v5p(T, segmented, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), "x")
    # XLA would choose another layout for arguments of jit if T is not a multiple of 8. Inside a model it does not.
    auto_layout = Format(Layout.AUTO, jax.NamedSharding(mesh, jax.P()))
    array = jax.ShapeDtypeStruct
    x, state = array((1, 4, T, 128), jnp.bfloat16), array((1, 4, 128, 128), jnp.float32)
    segments_BT = array((1, T), jnp.int32) if segmented else None

    def passes(q, k, v, g, seg, state, do, dstate):
        shared = q, k, v, g, seg, state
        return tpu.forward(*shared), tpu.backward(*shared, do, dstate)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(passes, in_shardings=auto_layout, out_shardings=auto_layout).lower(
            x, x, x, array((4,), jnp.float32), segments_BT, state, x, state)
    hlo = lowered.compile().as_text()
    assert hlo.count('custom_call_target="tpu_custom_call"') == 3
    assert not re.findall(rf"\[1,4,{T},128\]\S* copy\(", hlo), "a last chunk that is not full costs a copy"
