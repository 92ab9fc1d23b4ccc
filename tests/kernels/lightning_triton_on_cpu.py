"""Tests the Triton kernels of lightning attention in Triton's interpreter: against the recurrence in float64, and in a model.

test_lightning_triton.py runs this file in a separate process, because TRITON_INTERPRET must be set before triton is imported:

    TRITON_INTERPRET=1 JAX_PLATFORMS=cpu pytest tests/kernels/lightning_triton_on_cpu.py

The interpreter of Triton needs torch tensors, and multiplies the raw bits of bfloat16. These tests patch both, for the
operations that the kernels apply to bfloat16: load, store, cast and matrix product. A replacement of `triton_call` passes
numpy arrays.
"""
import jax
import ml_dtypes
import numpy as np
import pytest
import triton.language as tl
from lightning_cases import SLOPES, assert_close, case
from test_lightning_in_model import compare
from triton.runtime import interpreter

from mmx.kernels.lightning import triton

TYPES = {"float32": "fp32", "bfloat16": "bf16", "int32": "i32"}
GUARD = 4096        # elements before and after every array, to detect accesses outside of it


class Pointer:
    """Replaces an array argument of a kernel. The elements around it, and all elements of an output, are NaN or -1."""

    def __init__(self, shape, dtype, values=None):
        self.whole = np.full(int(np.prod(shape)) + 2 * GUARD, -1 if dtype == "int32" else np.nan, dtype)
        self.array = self.whole[GUARD:-GUARD].reshape(shape)
        self.dtype = TYPES[np.dtype(dtype).name]
        if values is not None:
            self.array[...] = values

    def data_ptr(self):
        return self.array.ctypes.data


def triton_call(*arrays, kernel, out_shape, grid, num_warps, num_stages, compute_capability, **static):
    def run(*arrays):
        out = Pointer(out_shape.shape, np.dtype(out_shape.dtype))
        arrays = [np.asarray(x) for x in arrays]
        kernel[grid](*(Pointer(x.shape, x.dtype, x) for x in arrays), out, **static)
        outside = np.concatenate([out.whole[:GUARD], out.whole[-GUARD:]])
        assert np.isnan(outside.astype(np.float32)).all(), f"{kernel.fn.__name__} writes outside its output"
        return out.array
    return jax.pure_callback(run, out_shape, *arrays)


def to_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(handle.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)


@pytest.fixture(autouse=True)
def patched_interpreter(monkeypatch):
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def round_to_nearest(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return interpreter.TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return cast(self, source, to)
    patched = set()

    def call(self, *args, **kwargs):        # the original patches triton.language at every call, which takes most of the time
        if self.fn not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn)
        return self.rewrite()(*args, **kwargs)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, to_float32(a), to_float32(b), *rest))
    monkeypatch.setattr(builder, "cast_impl", round_to_nearest)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, kwargs: (list(args), dict(kwargs)))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(triton.jax_triton, "triton_call", triton_call)


@pytest.mark.parametrize("T, K, V, dtype, segmented, chunk, slopes", [
    (1, 16, 32, "float32", True, None, SLOPES), (17, 128, 16, "bfloat16", True, None, SLOPES),
    (300, 16, 32, "float32", True, 64, (1.0, 4e-8)), (600, 16, 16, "float32", False, 32, SLOPES)])
def test_equals_the_recurrence(T, K, V, dtype, segmented, chunk, slopes):
    args, cotangents, *shared, want = case(T, K, V, dtype, segmented, slopes)
    *qkv, state = args
    got = (triton.forward(*qkv, *shared, state, chunk, interpret=True)
           + triton.backward(*qkv, *shared, state, *cotangents, chunk, interpret=True))
    assert_close(got, want, dtype)


def test_loss_and_gradients_equal_xla(monkeypatch):
    compare("triton", triton, monkeypatch)
