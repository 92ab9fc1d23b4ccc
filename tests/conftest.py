"""The suite runs on CPU, as eight simulated devices: a mesh takes its first ones, what knows no mesh runs on one."""
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()       # the devices are made now: `mesh.make` would ask for as many as it needs itself
