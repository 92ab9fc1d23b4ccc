"""Runs the suite on the CPU as eight simulated devices. A mesh uses the first ones; code without a mesh uses one."""
import os
import re
import tempfile
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # The suite mostly compiles programs that run for milliseconds. Without the compiler's optimizations it takes half the time.
    flags = ["--xla_backend_optimization_level=0"]
    if metadata.version("jaxlib").startswith("0.10."):      # later versions do not have this flag
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")])

from mmx.startup import cache

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")      # the suite has many small programs
cache.enable()      # all processes of the suite, and later runs of it, share compiled programs
os.environ.setdefault("MPLCONFIGDIR", str(Path("~/.cache/matplotlib").expanduser()))     # matplotlib's list of fonts
_data_cache = tempfile.TemporaryDirectory(prefix="mmx-tests-")   # for token stores
os.environ["XDG_CACHE_HOME"] = _data_cache.name

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()       # creates the eight devices now; otherwise `mesh.make` would create only as many as it needs


SLOWEST = ("test_notebooks.py", "test_train.py", "test_processes.py", "test_faults.py", "test_vision_training.py",
           "test_experiments.py", "test_mesh.py", "test_aot.py", "test_inference.py", "test_oracles.py")


def pytest_collection_modifyitems(items):
    """Runs the files that take a minute or more first, so that no worker is idle while another finishes one of them."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
    for item in items:
        item.user_properties += [("case", case.args[0]) for case in item.iter_markers("case")]


def pytest_terminal_summary(terminalreporter, config):
    """With `-m case`, prints the result of each case of docs/cases.md."""
    if config.option.markexpr != "case":
        return
    outcomes = {}
    for outcome in ("passed", "skipped", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name, number in report.user_properties:
                outcomes.setdefault(number, []).append(outcome) if name == "case" else None
    terminalreporter.section("cases")
    for line in (Path(__file__).parents[1] / "docs" / "cases.md").read_text().splitlines():
        if row := re.match(r"\| (\d+) \| (.*?) \|", line):
            found = outcomes.get(int(row[1]), [])
            right = found and not {"failed", "error"} & set(found) and "passed" in found
            terminalreporter.line(f"{row[1]:>3}  {'right' if right else 'WRONG' if found else 'no test':8}{row[2]}")


@pytest.fixture(scope="session")
def ragged_on_cpu():
    """Implements `jax.lax.ragged_all_to_all` on CPUs with all-gathers. JAX itself implements it only for TPUs and GPUs."""
    def exchange(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, axis_index_groups):
        arguments = operand, input_offsets, send_sizes, output_offsets
        operands, *tables = (jax.lax.all_gather(x, axis_name) for x in arguments)       # first axis: the sending device
        receiver, rows = jax.lax.axis_index(axis_name), jnp.arange(len(output))
        for sent, begin, size, offset in zip(operands, *(table[:, receiver] for table in tables)):
            received = (rows >= offset) & (rows < offset + size)
            output = jnp.where(received[:, None], sent[jnp.clip(begin + rows - offset, 0, len(operand) - 1)], output)
        return output

    counts = [jnp.zeros(1, jnp.int32)] * 4
    example = jax.shard_map(lambda x: jax.lax.ragged_all_to_all(x, x, *counts, axis_name="ep"),
                            mesh=jax.make_mesh((1,), ("ep",)),
                            in_specs=P(), out_specs=P(), check_vma=False)
    traced = jax.make_jaxpr(example)(jnp.zeros((1, 1)))
    primitive = next(eqn.primitive for eqn in traced.eqns[0].params["jaxpr"].eqns if "ragged" in eqn.primitive.name)
    mlir.register_lowering(primitive, mlir.lower_fun(exchange, multiple_results=False), platform="cpu")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Caches compiled programs, for a file whose tests run the same few programs. Yields the variables for subprocesses."""
    options = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
               "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()     # it reads the options only once
        if values is options:
            yield {name.upper(): str(value) for name, value in options.items()}
