"""Checks that a model's results are finite. If they are not, the error says which parameter is the cause."""
import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import NonFiniteError


def check(values, params, what: str) -> None:
    """Raises NonFiniteError if one of `values` is nan or infinite.

    Args:
      values: the results, as NumPy arrays or numbers.
      params: the parameters of the model that computed them. They are read only if a value is not finite.
      what: the name of the results, for the message.
    """
    values = np.asarray(values)
    if np.isfinite(values).all():
        return
    shown = values[~np.isfinite(values)].flat[0]
    if names := non_finite_params(params):
        cause = (f"the checkpoint's parameter {names[0]}{f' and {len(names) - 1} others' * (len(names) > 1)} contain"
                 f"{'s' * (len(names) == 1)} nan or infinity: the checkpoint is damaged or its training diverged; use an older "
                 "checkpoint, or convert it again")
    else:
        cause = "all parameters are finite, so the computation overflows: use float32"
    plural = what.endswith("s") and not what.endswith("loss")
    raise NonFiniteError(f"{what} of the model {'are' if plural else 'is'} not finite ({shown}): {cause}")


def non_finite_params(params) -> list[str]:
    """The names of the parameters that contain nan or infinity, such as "groups/layer_0/moe/w1_EDF"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, x in leaves
            if jnp.issubdtype(x.dtype, jnp.inexact) and not bool(jnp.isfinite(x).all())]
