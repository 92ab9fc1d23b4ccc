"""Runs the Triton kernels of lightning attention in Triton's interpreter, and tests the error without jax-triton."""
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mmx.kernels import platform
from mmx.kernels.lightning import api, lightning_attention


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.delitem(sys.modules, "mmx.kernels.lightning.triton", raising=False)
    monkeypatch.setattr(platform, "name", lambda: "gpu")
    q = jnp.ones((1, 2, 8, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="impl='triton': .* needs jax-triton .*: pip install jax-triton$"):
        lightning_attention(q, q, q, -jnp.ones(2), impl="triton")


def test_jax_0_12_is_refused(monkeypatch):
    """jax-triton 0.4.1 defines a rule of two arguments; JAX 0.12 calls it with three, so even a gradient fails."""
    monkeypatch.setattr(jax.version, "__version_info__", (0, 12, 0, 1))
    monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(__version__="0.4.1", __version_info__=(0, 4, 1)))
    for name in ("triton", "triton.language"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.delitem(sys.modules, "mmx.kernels.lightning.triton", raising=False)
    monkeypatch.setattr(platform, "name", lambda: "gpu")
    q = jnp.ones((1, 2, 8, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"^impl='triton': jax-triton 0\.4\.1 fails with JAX .* use impl='gpu'"):
        lightning_attention(q, q, q, -jnp.ones(2), impl="triton")


@pytest.mark.skipif(bool(api.missing("triton")), reason=api.missing("triton"))
def test_in_the_interpreter():
    cases = Path(__file__).parent / "lightning_triton_on_cpu.py"
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", cases], env=os.environ | {"TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
