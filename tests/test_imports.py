"""Who imports whom: one direction, and what needs no accelerator imports none."""
import ast
import configparser
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = {       # each package or module of mmx/, and those it may import; every one may import dims and config
    "dims": "", "config": "", "chips": "",
    "files": "",
    "kernels": "",
    "parallel": "kernels",
    "layers": "kernels parallel",
    "model": "kernels layers parallel",
    "mesh": "layers parallel",
    "analysis": "chips files layers model",
    "data": "files",
    "checkpoints": "data files kernels layers model parallel",
    "torch": "checkpoints files layers",
    "training": "analysis checkpoints data files kernels layers mesh model parallel",
    "inference": "checkpoints data files kernels layers model parallel torch",
    "evals": "analysis checkpoints data files inference model training",
    "compilers": "analysis chips data inference kernels layers mesh model parallel training",
    "launch": "analysis data evals files training",
    "cli": "analysis checkpoints compilers data evals files inference launch layers mesh parallel training",
}
FOREIGN = {     # packages that a part, or one of its modules, does without
    "dims": ("jax", "flax", "torch"), "config": ("jax", "flax", "torch"), "data": ("jax", "flax", "torch"),
    "files": ("jax", "flax", "torch"), "cli": ("jax", "flax", "torch"), "chips": ("jax", "flax", "torch"),
    "analysis": ("flax", "torch", "pandas", "sklearn"),
    "analysis.deepseek": ("jax",), "analysis.scaling": ("jax",), "analysis.scaling_report": ("jax",), "analysis.runs": ("jax",),
    "launch.experiments": ("jax", "flax", "torch"),
    "kernels": ("flax", "ml_collections", "torch"), "parallel": ("flax", "ml_collections", "torch"),
    "checkpoints": ("flax", "torch"),
}
LATER = {       # what a part imports only inside functions, so that it starts without the heavy packages
    "inference": "torch",
    "cli": "analysis checkpoints compilers data evals inference layers mesh parallel training", "launch": "evals",
}
FILES = sorted((ROOT / "mmx").rglob("*.py"))


def module(path: Path) -> str:
    """The module's name below mmx: "training.loss"; a package's own name for its __init__."""
    return ".".join(path.relative_to(ROOT / "mmx").with_suffix("").parts).removesuffix(".__init__")


def part(path: Path) -> str:
    return module(path).partition(".")[0]


def imported(path: Path, inside: bool = True) -> set[str]:
    """Full names of all that a file imports, `inside` functions too."""
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
    own = part(path)
    if own == "__init__":       # names are resolved when first used
        return
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("mmx.")}
    below = {own, "dims", "config", "__version__", *ABOVE[own].split()}
    assert parts <= below, f"{own} may not import {parts - below}"
    early = {name.split(".")[1] for name in imported(path, inside=False) if name.startswith("mmx.")}
    assert not early & set(LATER.get(own, "").split()), f"{own} imports {early} before it is called"
    without = (*FOREIGN.get(own, ()), *FOREIGN.get(module(path), ()))
    foreign = {name.split(".")[0] for name in imported(path)} & set(without)
    assert not foreign, f"{module(path)} does without {foreign}"


def test_no_modules_import_each_other():
    """Not in a circle of any length, imports inside functions included."""
    modules = {module(path): path for path in FILES if module(path) != "__init__"}
    graph = {}
    for name, path in modules.items():
        found = [full.removeprefix("mmx.") for full in imported(path) if full.startswith("mmx.")]
        graph[name] = {full if full in modules else full.rpartition(".")[0] for full in found} & modules.keys() - {name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_few_modules_stand_outside_packages():
    assert len(list((ROOT / "mmx").glob("*.py"))) <= 8


def test_kernels_are_found_under_the_package():
    code = ("import mmx\nfunctions = mmx.kernels.lightning.lightning_attention, mmx.kernels.attention.softmax_attention\n"
            "print(*(f.__name__ for f in functions))")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.split() == ["lightning_attention", "softmax_attention"]


def test_kernels_hold_no_experiment():
    """kernels/ are functions on arrays: no config object, no environment."""
    for path in FILES:
        if part(path) == "kernels":
            assert not imported(path) & {"os", "mmx.config"}, path


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.name)
def test_experiments_import_config_only(path):
    assert {name.rpartition(".")[0] for name in imported(path)} <= {"mmx.config", "mmx.analysis.counts"}


@pytest.mark.parametrize("modules, without", [
    ("mmx, mmx.cli, mmx.config, mmx.launch.experiments", ("jax", "flax", "orbax", "grain", "torch", "matplotlib")),
    ("mmx.data.pipeline", ("flax", "transformers")),
    ("mmx.analysis.scaling, mmx.analysis.scaling_report", ("jax", "flax", "torch", "matplotlib", "pandas")),
    ("mmx.training.run, mmx.inference.engine, mmx.checkpoints.convert, mmx.evals.compression",
     ("transformers", "matplotlib", "torch")),
])
def test_heavy_packages_come_when_needed(modules, without):
    code = f"import sys, {modules}\nprint(*[m for m in {without} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_is_imported_is_declared():
    """In setup.cfg, as what mmx needs; mmx.torch, a kernel and lm-eval's tasks need their extras."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split("\n")
    modules = {"absl-py": "absl", "orbax-checkpoint": "orbax", "pillow": "pil"}
    packages = [re.match(r"[\w-]+", line)[0] for line in lines if line]
    declared = {modules.get(name, name.lower().replace("-", "_")) for name in packages} | {"mmx"} | sys.stdlib_module_names
    for path in FILES:
        extra = {"torch": {"torch", "transformers"}, "kernels": {"jax_triton", "triton"}, "compilers": {"jax_triton"},
                 "evals": {"datasets", "lm_eval", "sacrebleu"}}
        assert {name.partition(".")[0].lower() for name in imported(path)} - extra.get(part(path), set()) <= declared, path
