"""Imports between packages go one way, and light modules do not import heavy packages."""
import ast
import configparser
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = re.findall(r"^\| (`.+?) \| .+? \| (.+?) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
# Each package or module of mmx/, and those it may import. All of them may import dims and config.
ALLOWED = {name: re.findall(r"\w+", allowed) for names, allowed in TABLE for name in re.findall(r"`(\w+)`", names)}
FORBIDDEN = {   # external packages that a package of mmx, or one of its modules, may not import
    "dims": ("jax", "flax", "torch"), "config": ("jax", "flax", "torch"), "data": ("jax", "flax", "torch"),
    "startup": ("jax", "flax", "torch", "numpy", "rich", "tqdm"), "files": ("jax", "flax", "torch"),
    "cli": ("jax", "flax", "torch"), "chips": ("jax", "flax", "torch"),
    "analysis": ("flax", "torch", "pandas", "sklearn"),
    "analysis.deepseek": ("jax",), "analysis.scaling": ("jax",), "analysis.scaling_report": ("jax",), "analysis.runs": ("jax",),
    "launch.experiments": ("jax", "flax", "torch"),
    "kernels": ("flax", "ml_collections", "torch"), "parallel": ("flax", "ml_collections", "torch"),
    "checkpoints": ("flax", "torch"),
}
DEFERRED = {    # packages that may be imported only inside functions, so that the importing package loads quickly
    "inference": "torch",
    "cli": "analysis checkpoints compilers data evals inference layers mesh parallel training", "launch": "evals",
}
FILES = sorted((ROOT / "mmx").rglob("*.py"))


def module(path: Path) -> str:
    """The module's name below mmx, such as "training.loss"; for an __init__ file, the package's name."""
    return ".".join(path.relative_to(ROOT / "mmx").with_suffix("").parts).removesuffix(".__init__")


def package(path: Path) -> str:
    """The first component of the module's name."""
    return module(path).partition(".")[0]


def imported(path: Path, inside: bool = True) -> set[str]:
    """Full names of everything that a file imports; with `inside`, also inside functions."""
    found, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = package(path)
    if own == "__init__":       # imports its modules lazily, when a name is first used
        return
    packages = {name.split(".")[1] for name in imported(path) if name.startswith("mmx.")}
    allowed = {own, "dims", "config", "__version__", *ALLOWED[own]}
    assert packages <= allowed, f"{own} may not import {packages - allowed}"
    early = {name.split(".")[1] for name in imported(path, inside=False) if name.startswith("mmx.")}
    too_early = early & set(DEFERRED.get(own, "").split())
    assert not too_early, f"{own} may import {too_early} only inside functions"
    forbidden = {*FORBIDDEN.get(own, ()), *FORBIDDEN.get(module(path), ())}
    found = {name.split(".")[0] for name in imported(path)} & forbidden
    assert not found, f"{module(path)} may not import {found}"


def test_imports_have_no_cycles():
    """Imports inside functions count too."""
    modules = {module(path): path for path in FILES if module(path) != "__init__"}
    graph = {}
    for name, path in modules.items():
        found = [full.removeprefix("mmx.") for full in imported(path) if full.startswith("mmx.")]
        graph[name] = {full if full in modules else full.rpartition(".")[0] for full in found} & modules.keys() - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_few_modules_are_outside_packages():
    assert len(list((ROOT / "mmx").glob("*.py"))) <= 8


def test_kernels_are_attributes_of_the_package():
    code = ("import mmx\nfunctions = mmx.kernels.lightning.lightning_attention, mmx.kernels.attention.softmax_attention\n"
            "print(*(f.__name__ for f in functions))")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert output.split() == ["lightning_attention", "softmax_attention"]


def test_kernels_use_neither_config_nor_environment():
    for path in FILES:
        if package(path) == "kernels":
            assert not imported(path) & {"os", "mmx.config"}, path


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.name)
def test_experiments_import_config_only(path):
    assert {name.rpartition(".")[0] for name in imported(path)} <= {"mmx.config", "mmx.analysis.counts"}


@pytest.mark.parametrize("modules, unloaded", [
    ("mmx, mmx.cli, mmx.config, mmx.launch.experiments", ("jax", "flax", "orbax", "grain", "torch", "matplotlib")),
    ("mmx.data.pipeline", ("flax", "transformers")),
    ("mmx.analysis.scaling, mmx.analysis.scaling_report", ("jax", "flax", "torch", "matplotlib", "pandas")),
    ("mmx.training.run, mmx.inference.engine, mmx.checkpoints.convert, mmx.evals.compression",
     ("transformers", "matplotlib", "torch")),
])
def test_heavy_packages_are_imported_when_needed(modules, unloaded):
    code = f"import sys, {modules}\nprint(*[m for m in {unloaded} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_setup_cfg_declares_every_import():
    """mmx.torch, the Triton kernel, the lm-eval tasks and URLs may also import packages of their extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    modules = {"absl-py": "absl", "orbax-checkpoint": "orbax", "pillow": "pil"}
    packages = [re.match(r"[\w-]+", line)[0] for line in lines if line]
    declared = {modules.get(name, name.lower().replace("-", "_")) for name in packages} | {"mmx"} | sys.stdlib_module_names
    for path in FILES:
        extra = {"torch": {"torch", "transformers"}, "kernels": {"jax_triton", "triton", "tokamax"},
                     "compilers": {"jax_triton"},
                 "evals": {"datasets", "lm_eval", "sacrebleu"}, "files": {"upath"}}
        assert {name.partition(".")[0].lower() for name in imported(path)} - extra.get(package(path), set()) <= declared, path
