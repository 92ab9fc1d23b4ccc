import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import jax

jax.config.update("jax_num_cpu_devices", 8)
