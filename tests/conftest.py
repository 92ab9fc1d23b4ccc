"""The suite runs on CPU, as eight simulated devices: a mesh takes its first ones, what knows no mesh runs on one."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Most of the suite's time is LLVM's, on programs that run for milliseconds: without its optimizations it is half.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()       # the devices are made now: `mesh.make` would ask for as many as it needs itself
