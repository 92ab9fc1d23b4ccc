"""Compiles the GPU kernels of lightning attention, in Pallas and in Triton, for GPUs that need not be present."""
import importlib
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mmx.compilers import ptx
from mmx.kernels import platform
from mmx.kernels.lightning import api, gpu

needs_compiler = pytest.mark.skipif(bool(ptx.missing()), reason=ptx.missing())
NO_TRITON = api.missing("triton")
SPILLS = r"_?(output|contribution)_kernel.* spills \d+ bytes per thread; try a smaller tile or more warps"
OVERSIZE = r"_output_kernel \d+ needs \d+ bytes of shared memory, and a CTA on h100 has 232448"
TRITON = pytest.param("triton", marks=pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON))


@pytest.mark.parametrize("impl", ["gpu", TRITON])
def test_unsupported_arrays_are_refused(impl):
    module = importlib.import_module(f"mmx.kernels.lightning.{impl}")

    def message(K=16, V=16, dtype="float32", chunk=None, interpret=True):
        q, v, state = (jnp.zeros((1, 4, *shape), dtype) for shape in ((8, K), (8, V), (K, V)))
        with pytest.raises(NotImplementedError) as caught:
            module.forward(q, q, v, -jnp.ones(4), None, state, chunk, interpret=interpret)
        return str(caught.value)
    assert "K=12" in message(K=12)
    assert "q is float16" in message(dtype="float16")
    assert "chunk=48" in message(chunk=48)
    assert message(128, 128, "bfloat16", 128, interpret=False) == (
        "chunk=128: with bfloat16 heads of 128 on h100 the GPU kernels support chunks of 16, 32, 64 tokens, or None")
    if impl == "triton":
        assert "V=256 in float32: the Triton kernels support up to 128, impl='gpu' up to 256" in message(V=256)


def test_a_chosen_kernel_uses_the_nearest_chunk(monkeypatch):
    chunks = []
    monkeypatch.setattr(platform, "name", lambda: "gpu")
    monkeypatch.setitem(api.MODULES, "gpu", types.SimpleNamespace(
        array_refusal=gpu.array_refusal, forward=lambda *args: (chunks.append(args[-1]), (args[2], args[5]))[1]))
    for dtype in ("bfloat16", "float32"):
        x = jnp.zeros((1, 1, 4, 64), dtype)
        for chunk in (128, 48, 5, None):
            api.lightning_attention(x, x, x, -jnp.ones(1), chunk=chunk)
    assert chunks == [64, 32, 16, None, 16, 16, 16, None]


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Returns a function that compiles a forward and a backward pass and returns their kernels, and the CTAs of each launch."""
    def compile_for(impl, chip, H, T, K, V, dtype, segmented, gradients=True):
        module, launched = importlib.import_module(f"mmx.kernels.lightning.{impl}"), []
        if impl == "triton":
            call = module.jax_triton.triton_call

            def record(*args, grid, **kwargs):
                launched.append(grid[0] * grid[1])
                return call(*args, grid=grid, **kwargs)
            monkeypatch.setattr(module.jax_triton, "triton_call", record)
            monkeypatch.setattr(module.jax_triton.triton_lib, "_JAX_TRITON_DUMP_DIR", str(tmp_path))
        struct = jax.ShapeDtypeStruct
        q, v = struct((1, H, T, K), dtype), struct((1, H, T, V), dtype)
        state = struct((1, H, K, V), jnp.float32)
        segments = struct((1, T), jnp.int32) if segmented else None

        def run(q, k, v, do, log_decay_H, segments, state, dstate):
            out = module.forward(q, k, v, log_decay_H, segments, state, None)
            return out, gradients and module.backward(q, k, v, log_decay_H, segments, state, do, dstate, None)
        kernels = ptx.resources(run, q, q, v, v, struct((H,), jnp.float32), segments, state, state, chip=chip)
        passes = "contribution", "output", "carry"
        kernels = {name: kernel for name, kernel in kernels.items() if name.startswith(passes)}
        return kernels | ptx.read_dump(tmp_path, chip), launched + [kernel.ctas for kernel in kernels.values()]
    return compile_for


@needs_compiler
@pytest.mark.parametrize("impl", ["gpu", TRITON])
@pytest.mark.parametrize("chip, H, T, K, V, dtype", [
    ("h100", 32, 1022, 128, 128, "bfloat16"), ("a100", 32, 1022, 128, 128, "bfloat16"),
    ("h100", 16, 8190, 256, 256, "bfloat16"), ("a100", 16, 8190, 64, 128, "float32")])
def test_resources(compiled, impl, chip, H, T, K, V, dtype):
    """The hardest case of each tile: documents, and a T that is not a multiple of the chunk."""
    kernels, ctas = compiled(impl, chip, H, T, K, V, dtype, segmented=True)
    assert not ptx.faults(kernels, chip)
    assert platform.GPUS[chip].multiprocessors == ptx.limit(chip, "core_count") <= min(ctas)
    # Passes 1 and 2 forward and reverse in time, and pass 3 for o, dq, dk and dv. The forward and backward passes share states.
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        assert dtype == "float32" or "carry" in name or kernel.tensor, f"{name} uses no tensor cores"


@needs_compiler
def test_faults_report_a_spill(compiled, monkeypatch):
    monkeypatch.setitem(gpu.TILES["a100"], ("bfloat16", 128), gpu.Tile(64, 64, 4, 3))
    faults = ptx.faults(compiled("gpu", "a100", 16, 8190, 128, 128, "bfloat16", True, gradients=False)[0], "a100")
    assert re.fullmatch(SPILLS, "\n".join(faults))


@needs_compiler
@pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON)
@pytest.mark.parametrize("chip, tile, fault", [
    ("a100", gpu.Tile(32, 64, 4, 2), SPILLS), ("h100", gpu.Tile(64, 64, 4, 8), OVERSIZE)], ids=["spill", "oversize"])
def test_faults_report_what_triton_does_not(compiled, monkeypatch, chip, tile, fault):
    from mmx.kernels.lightning import triton
    monkeypatch.setitem(triton.TILES[chip], ("bfloat16", 128), tile)
    kernels, _ = compiled("triton", chip, 16, 8190, 128, 128, "bfloat16", chip == "a100", gradients=False)
    faults = ptx.faults(kernels, chip)
    assert any(re.fullmatch(fault, text) for text in faults), faults


def products(shape):
    """Returns a kernel that sums eight products of tiles of a shape, with three pairs of tiles in flight, and its arguments."""
    def kernel(x_ref, y_ref, o_ref):
        def step(i, total):
            x, y = x_ref[i], y_ref[i]
            return total + jnp.dot(x, y.T, preferred_element_type=jnp.float32)
        o_ref[...] = jax.lax.fori_loop(0, 8, step, jnp.zeros(o_ref.shape, jnp.float32))
    call = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((shape[0], shape[0]), jnp.float32),
                          compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=4), name="products")
    tiles = jax.ShapeDtypeStruct((8, *shape), jnp.bfloat16)
    return call, tiles, tiles


@needs_compiler
def test_too_much_shared_memory_is_refused():
    call, *tiles = products((64, 64))
    assert not ptx.faults(ptx.resources(call, *tiles, chip="h100"), "h100")
    call, *tiles = products((128, 512))
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory size limit exceeded: requested 1048576, available: 232448"):
        ptx.resources(call, *tiles, chip="h100")


@needs_compiler
def test_an_illegal_tile_is_refused():
    call, *tiles = products((48, 64))
    with pytest.raises(Exception, match="results whose size is a power of 2. Encountered an array of shape .48, 64."):
        ptx.resources(call, *tiles, chip="h100")


@needs_compiler
def test_faults_report_tf32():
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    call = pl.pallas_call(lambda x_ref, o_ref: o_ref.__setitem__(..., jnp.dot(x_ref[...], x_ref[...])), out_shape=x,
                          compiler_params=plgpu.CompilerParams(num_warps=4), name="rounded")
    assert ptx.faults(ptx.resources(call, x, chip="h100"), "h100") == [
        "rounded rounds its operands to tf32; use precision HIGHEST"]
