"""Matrix products whose sums are kept in float32 (float64 for float64 operands).

A product of two float32 operands keeps their full precision on every device; accelerators would otherwise round them to
bfloat16 or tf32. If one operand is bfloat16, the product has the default precision of the device, which may round the other
operand to bfloat16 too.
"""
import jax
import jax.numpy as jnp
from jax.lax import Precision

from mmx.kernels.dtypes import wide_dtype


def einsum(spec: str, x, y):
    """Computes jnp.einsum of two arrays, for XLA."""
    precision = Precision.DEFAULT if jnp.bfloat16 in (x.dtype, y.dtype) else Precision.HIGHEST
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=wide_dtype(x.dtype, y.dtype))


def dot(x, y, x_axis: int, y_axis: int):
    """Multiplies two matrices of one dtype over one axis of each, in the body of a Pallas kernel (TPU or Triton)."""
    precision = Precision.HIGHEST if x.dtype == jnp.float32 else Precision.DEFAULT
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)
