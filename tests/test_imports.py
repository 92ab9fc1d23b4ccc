"""Who imports whom: one direction, and what needs no accelerator imports none."""
import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = {       # each part, and the parts it may import; every part may import dims, config and untrusted
    "dims": "", "config": "", "untrusted": "", "chips": "", "atomic": "", "checksums": "", "lock": "atomic", "guards": "",
    "kernels": "",
    "parallel": "kernels",
    "int8": "",
    "layers": "int8 kernels parallel",
    "model": "layers parallel",
    "loss": "model parallel",
    "data": "atomic", "released": "",
    "optim": "", "metrics": "atomic",
    "checkpoint": "atomic checksums released",
    "torch": "checkpoint released",
    "inference": "data model parallel",
    "prefix": "atomic inference parallel",
    "convert": "atomic checkpoint data inference int8 model parallel released torch",
    "evals": "atomic checkpoint convert data inference loss metrics model",
    "train": "checkpoint convert data evals guards lock loss metrics model optim parallel",
    "sweep": "atomic data evals guards metrics train",
    "deepseek": "", "memory": "chips deepseek", "scaling": "", "experiments": "", "hugepages": "", "processes": "",
    "compilers": "",
    "bench": "chips compilers kernels layers parallel",
    "aot": "chips compilers data inference model optim parallel train",
    "search": "aot chips model parallel",
    "cli": "aot bench checkpoint convert data evals experiments hugepages inference memory prefix parallel processes scaling "
           "search sweep train",
}
FOREIGN = {     # packages that a part does without
    "dims": ("jax", "flax", "torch"), "config": ("jax", "flax", "torch"), "data": ("jax", "flax", "torch"),
    "released": ("jax", "flax", "torch"), "cli": ("jax", "flax", "torch"),
    "experiments": ("jax", "flax", "torch"),
    "memory": ("jax", "flax", "torch"), "deepseek": ("jax", "flax", "torch"),
    "scaling": ("jax", "flax", "torch", "pandas", "sklearn"),
    "kernels": ("flax", "ml_collections", "torch"), "parallel": ("flax", "ml_collections", "torch"),
    "convert": ("flax",), "checkpoint": ("flax",),
}
LATER = {       # what a part imports only inside functions
    "convert": "inference model parallel torch", "evals": "convert",
    "cli": "aot bench checkpoint convert data evals inference memory scaling search sweep train", "sweep": "evals train",
}
FILES = sorted((ROOT / "mmx").rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT / "mmx").with_suffix("").parts[0]


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
    below = {own, "dims", "config", "untrusted", "__version__", *ABOVE[own].split()}
    assert parts <= below, f"{own} may not import {parts - below}"
    early = {name.split(".")[1] for name in imported(path, inside=False) if name.startswith("mmx.")}
    assert not early & set(LATER.get(own, "").split()), f"{own} imports {early} before it is called"
    foreign = {name.split(".")[0] for name in imported(path)} & set(FOREIGN.get(own, ()))
    assert not foreign, f"{own} does without {foreign}"


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
    assert {name.rpartition(".")[0] for name in imported(path)} == {"mmx.config"}


@pytest.mark.parametrize("modules, without", [
    ("mmx, mmx.cli, mmx.config, mmx.released", ("jax", "flax", "orbax", "grain", "torch", "matplotlib")),
    ("mmx.data.pipeline", ("flax", "transformers")),
    ("mmx.scaling", ("jax", "flax", "torch", "matplotlib", "pandas")),
    ("mmx.train, mmx.inference, mmx.convert, mmx.evals.compression", ("transformers", "matplotlib", "torch")),
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
        extra = {"torch": {"torch", "transformers"}, "kernels": {"jax_triton", "triton"}, "bench": {"jax_triton"},
                 "evals": {"datasets", "lm_eval", "sacrebleu"}}
        assert {name.partition(".")[0].lower() for name in imported(path)} - extra.get(part(path), set()) <= declared, path
