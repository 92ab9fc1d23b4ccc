"""The suite runs on CPU, as eight simulated devices: a mesh takes its first ones, what knows no mesh runs on one."""
import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the suite's time is the compiler's, on programs that run for milliseconds: without its optimizations it is half.
    flags = ["--xla_backend_optimization_level=0"]
    if metadata.version("jaxlib").startswith("0.10."):      # later ones do not know it
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()       # the devices are made now: `mesh.make` would ask for as many as it needs itself


LONGEST = ("test_notebooks.py", "test_train.py", "test_processes.py", "test_faults.py", "test_vision_training.py",
           "test_experiments.py", "test_mesh.py", "test_aot.py", "test_inference.py", "test_oracles.py")


def pytest_collection_modifyitems(items):
    """Files that take a minute or more come first: of two workers none ends with one of them, the other being idle."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def ragged_on_cpu():
    """JAX's primitive with its own transpose, which no CPU has, made of gathers as its documentation says."""
    def from_all(x, into, stood_P, sent_P, lands_P, came_P, *, axis_name, axis_index_groups):
        x_PI, stood_PP, sent_PP, lands_PP = (jax.lax.all_gather(a, axis_name) for a in (x, stood_P, sent_P, lands_P))
        here, places = jax.lax.axis_index(axis_name), jnp.arange(len(into))
        for part, stood, sent, lands in zip(x_PI, stood_PP[:, here], sent_PP[:, here], lands_PP[:, here]):
            came = (places >= lands) & (places < lands + sent)
            into = jnp.where(came[:, None], part[jnp.clip(stood + places - lands, 0, len(x) - 1)], into)
        return into

    counts = [jnp.zeros(1, jnp.int32)] * 4
    exchange = jax.shard_map(lambda x: jax.lax.ragged_all_to_all(x, x, *counts, axis_name="ep"),
                             mesh=jax.make_mesh((1,), ("ep",)),
                             in_specs=P(), out_specs=P(), check_vma=False)
    traced = jax.make_jaxpr(exchange)(jnp.zeros((1, 1)))
    primitive = next(eqn.primitive for eqn in traced.eqns[0].params["jaxpr"].eqns if "ragged" in eqn.primitive.name)
    mlir.register_lowering(primitive, mlir.lower_fun(from_all, multiple_results=False), platform="cpu")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """For a file whose tests run the same few programs, and in subprocesses too: most of their time is compilation."""
    options = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
               "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()     # it looks at the options once
        if values is options:
            yield {name.upper(): str(value) for name, value in options.items()}
