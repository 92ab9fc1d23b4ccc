"""The Triton kernels of lightning attention: their numerics in Triton's interpreter, and compiled for GPUs not here."""
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mmx.compilers import ptx
from mmx.kernels.lightning import gpu

MISSING = "" if importlib.util.find_spec("jax_triton") else "jax-triton is not installed: pip install jax-triton"
needs_triton = pytest.mark.skipif(bool(MISSING), reason=MISSING)
needs_compiler = pytest.mark.skipif(bool(MISSING or ptx.missing()), reason=MISSING or ptx.missing())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.delitem(sys.modules, "mmx.kernels.lightning.triton", raising=False)
    with pytest.raises(ImportError, match="pip install jax-triton$"):
        importlib.import_module("mmx.kernels.lightning.triton")


@needs_triton
def test_against_recurrence_in_the_interpreter():
    cases = Path(__file__).parent / "lightning_triton_on_cpu.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", cases], env=os.environ | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_what_the_kernels_do_not_take_is_refused():
    from mmx.kernels.lightning import triton
    q = jnp.zeros((1, 4, 8, 12))
    with pytest.raises(NotImplementedError, match="K=12"):
        triton.forward(q, q, q, -jnp.ones(4), None, jnp.zeros((1, 4, 12, 12)), None)
    with pytest.raises(NotImplementedError, match="V=256 in float32"):
        triton.forward(q, q, jnp.zeros((1, 4, 8, 256)), -jnp.ones(4), None, jnp.zeros((1, 4, 12, 256)), None)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A function that compiles a forward and a backward pass and returns their kernels; and what was launched."""
    import jax_triton

    from mmx.kernels.lightning import triton
    launched, call = [], jax_triton.triton_call

    def record(*args, **kwargs):
        launched.append((kwargs["kernel"].fn.__name__, kwargs["grid"]))
        return call(*args, **kwargs)
    monkeypatch.setattr(jax_triton, "triton_call", record)
    monkeypatch.setattr(jax_triton.triton_lib, "_JAX_TRITON_DUMP_DIR", str(tmp_path))

    def compile_for(chip, H, T, K, V, dtype, segmented, chunk=None):
        struct = jax.ShapeDtypeStruct
        q, v = struct((1, H, T, K), dtype), struct((1, H, T, V), dtype)
        state = struct((1, H, K, V), jnp.float32)
        segments = struct((1, T), jnp.int32) if segmented else None

        def run(q, k, v, do, log_decay_H, segments, state, dstate):
            return (triton.forward(q, k, v, log_decay_H, segments, state, chunk),
                    triton.backward(q, k, v, log_decay_H, segments, state, do, dstate, chunk))
        ptx.resources(run, q, q, v, v, struct((H,), jnp.float32), segments, state, state, chip=chip)
        return ptx.dumped(tmp_path, chip), launched
    return compile_for


@needs_compiler
@pytest.mark.parametrize("chip", ["h100", "a100"])
@pytest.mark.parametrize("H, T, K, V, dtype, segmented", [
    (16, 8190, 64, 64, "bfloat16", True), (16, 8190, 128, 128, "bfloat16", True), (16, 8190, 256, 256, "bfloat16", True),
    (64, 1024, 128, 128, "bfloat16", False), (16, 8190, 256, 64, "bfloat16", False), (16, 8190, 64, 128, "float32", True)])
def test_resources(compiled, chip, H, T, K, V, dtype, segmented):
    kernels, launched = compiled(chip, H, T, K, V, dtype, segmented)
    assert not ptx.faults(kernels, chip)
    assert len(kernels) == 6        # pass 1 either way in time, pass 3 for o, dq, dk and dv
    if dtype == "bfloat16":
        assert all(kernel.tensor for kernel in kernels.values())
    for name, (x, y) in launched:
        assert x * y >= gpu.CORES[chip], f"{name} leaves SMs idle: {x * y} CTAs"


@needs_compiler
def test_the_check_sees_a_spill(compiled, monkeypatch):
    from mmx.kernels.lightning import triton
    monkeypatch.setitem(triton.TILES["a100"], ("bfloat16", 128), gpu.Tile(32, 64, 4, 2))
    kernels, _ = compiled("a100", 16, 8190, 128, 128, "bfloat16", True)
    assert any("_contribution_kernel" in fault and "spills" in fault for fault in ptx.faults(kernels, "a100"))


@needs_compiler
def test_the_check_sees_too_much_shared_memory(compiled, monkeypatch):
    from mmx.kernels.lightning import triton
    monkeypatch.setitem(triton.TILES["h100"], ("bfloat16", 128), gpu.Tile(128, 128, 8, 6))
    kernels, _ = compiled("h100", 16, 8190, 128, 128, "bfloat16", False)
    assert any("shared memory" in fault for fault in ptx.faults(kernels, "h100"))
