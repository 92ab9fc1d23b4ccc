"""Installing mmx: extras, pinned versions, installed experiments, the notebooks' first cell, and the repository's address."""
import configparser
import importlib.util
import json
import re
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from mmx.config import ConfigError
from mmx.launch import experiments, runtime

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")
EXTRAS = SETTINGS["options.extras_require"]
EXPERIMENTS = {path.stem for path in (ROOT / "experiments").glob("*.py")}


def test_extras_of_accelerators_install_jax_for_them():
    expected = {"cuda12": ["jax[cuda12]", "jax-triton", "tokamax"], "cuda13": ["jax[cuda13]", "jax-triton", "tokamax"],
                "tpu": ["jax[tpu]"], "gpu": ["mmx[cuda12]"]}
    for name, packages in expected.items():
        assert [re.split(r"[ ;]", line)[0] for line in EXTRAS[name].strip().splitlines()] == packages
    bounds = set(re.findall(r"^jax(?:-cuda12-\w+|\[\w+\])? (.*)$", "\n".join(
        line.strip() for line in (SETTINGS["options"]["install_requires"] + "\n" + "\n".join(EXTRAS.values())).splitlines()),
        re.M))
    assert bounds == {">= 0.10.2, < 0.13"}


@pytest.mark.parametrize("python, versions", [
    ("3.11", {"jax": "0.10.2", "jaxlib": "0.10.2", "torch": "2.13.0", "transformers": "5.23.0"}),
    ("3.12", {"jax": "0.11.2", "jaxlib": "0.11.2", "jax-triton": "0.4.1", "torch": None})])
def test_pinned_versions(python, versions):
    pinned = dict(line.split("==") for line in (ROOT / f"constraints-{python}.txt").read_text().splitlines())
    assert {name: pinned.get(name) for name in versions} == versions


@pytest.mark.parametrize("python, constraints, torch", [
    ("3.11", "--constraint constraints-3.11.txt", True), ("3.12", "--constraint constraints-3.12.txt", False),
    ("3.13", "", False)])
def test_make_follows_the_version_of_python(python, constraints, torch, tmp_path):
    """`make` picks the constraints by PYTHON, and deletes a .venv that was built with another version."""
    chosen = tmp_path / "chosen"
    chosen.write_text(f"#!/bin/sh\necho {python}\n")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints-3.11.txt", "constraints-3.12.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stale = tmp_path / ".venv" / "bin" / "python"
    stale.parent.mkdir(parents=True)
    stale.write_text("#!/bin/sh\nexit 1\n")
    for path in (chosen, stale):
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    plan = subprocess.run(["make", "-n", "test", f"PYTHON={chosen}"], cwd=tmp_path, capture_output=True, text=True,
                          check=True).stdout
    installs = [line for line in plan.splitlines() if " pip " in line]
    assert all(line.split("--quiet ")[1].startswith(constraints + " --editable") for line in installs) and len(installs) == 2
    assert (",torch]" in installs[1]) == torch
    check = next(line for line in plan.splitlines() if "rm -rf .venv" in line)
    assert f"({python.replace('.', ',')})" in check
    subprocess.run(check, shell=True, cwd=tmp_path, check=True)
    assert not (tmp_path / ".venv").exists()


def test_a_copy_without_the_clone_finds_the_experiments(tmp_path):
    """A wheel has mmx and the files of package_data, as this copy has: links become files."""
    patterns = SETTINGS["options.package_data"]["mmx"].split()
    assert {path.stem for pattern in patterns for path in (ROOT / "mmx").glob(pattern)} == EXPERIMENTS
    shutil.copytree(ROOT / "mmx", tmp_path / "site" / "mmx", ignore=shutil.ignore_patterns("__pycache__", "results", "*.xz"))
    code = "from mmx.launch import experiments as e; print(e.read('tiny', []).model.dim, e.read('text_01:v5p-512', []).mesh.ep)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
                         capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["128", str(experiments.read(str(ROOT / "experiments/text_01.py:v5p-512"), []).mesh.ep)]


def test_a_file_comes_before_an_installed_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needle").mkdir()       # a run's workdir of the same name does not hide the experiment
    assert experiments.read("needle:hybrid", []).model.pattern == "LLLS"
    (tmp_path / "needle").rmdir()
    (tmp_path / "needle").write_text("from mmx.config import default\ndef get_config():\n    return default()\n")
    assert experiments.find("needle") == "needle"
    with pytest.raises(ConfigError, match="no experiment file tinny; did you mean tiny?"):
        experiments.read("tinny", [])
    with pytest.raises(ConfigError, match=r"no experiment file experiments/tiny\.py; known: .*tiny"):
        experiments.read("experiments/tiny.py", [])


class Runtime(NamedTuple):
    """A faked Colab runtime."""
    cuda: str | None            # that the driver reports
    pci: tuple[str, str]        # vendor and device on the bus
    devices: list | Exception   # what jax.devices() does: (platform, kind) of each, or an error


GVNIC, V5E = ("0x1ae0", "0x0042"), ("0x1ae0", "0x0063")        # Google's network card; a TPU
CPU = Runtime(None, GVNIC, [("cpu", "cpu")])
GPU = Runtime("12.4", GVNIC, [("gpu", "Tesla T4")])
TPU = Runtime(None, V5E, [("tpu", "TPU v5 lite")] * 8)
CHANGE = "for a GPU or a TPU, choose Runtime > Change runtime type and run this cell again"
RESTART = "choose Runtime > Restart session and run this cell again, or else Runtime > Disconnect and delete runtime"


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Returns a function that runs `runtime.install` on a faked runtime; it returns pip's arguments and the line."""
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)      # tests that compile for a TPU set it
    def install(faked: Runtime, *extras, pip_status=0):
        pip, run = [], subprocess.run
        driver = "exit 9" if faked.cuda is None else f"echo '| Driver Version: 550.54.15    CUDA Version: {faked.cuda}     |'"
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        (tmp_path / "pci" / "0000:00:05.0").mkdir(parents=True, exist_ok=True)
        for name, number in zip(("vendor", "device"), faked.pci):
            (tmp_path / "pci" / "0000:00:05.0" / name).write_text(f"{number}\n")

        def fake_run(command, **options):
            if command[0] == "nvidia-smi":
                return run(command, **options)
            pip.append(command)
            return types.SimpleNamespace(returncode=pip_status, stderr="noise\nERROR: No matching distribution found\n")

        def fake_devices():
            if isinstance(faked.devices, Exception):
                raise faked.devices
            return [types.SimpleNamespace(platform=platform, device_kind=kind) for platform, kind in faked.devices]
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(runtime, "BUS", tmp_path / "pci")
        monkeypatch.setattr(subprocess, "run", fake_run)
        monkeypatch.setattr(jax, "devices", fake_devices)
        line = runtime.install(list(extras))
        [command] = pip
        assert command[:-1] == [sys.executable, "-m", "pip", "install", "--quiet"]
        return command[-1], line
    return install


@pytest.mark.parametrize("faked, extras, package, line", [
    (CPU, [], "", f"JAX uses 1 x cpu; {CHANGE}"), (CPU, ["torch"], "[torch]", f"JAX uses 1 x cpu; {CHANGE}"),
    (GPU, ["torch"], "[cuda12,torch]", "JAX uses 1 x Tesla T4"),
    (GPU._replace(cuda="13.0"), [], "[cuda13]", "JAX uses 1 x Tesla T4"),
    (GPU._replace(cuda="11.8", devices=CPU.devices), [], "",
     "JAX uses 1 x cpu: this runtime has a GPU with a driver for CUDA 11.8, and JAX needs 12 or newer. Update the driver."),
    (GPU._replace(devices=CPU.devices), [], "[cuda12]",
     f"this runtime has a GPU with a driver for CUDA 12.4, but JAX uses 1 x cpu: {RESTART}"),
    (TPU, ["tpu"], "[tpu]", "JAX uses 8 x TPU v5 lite"),
    (TPU._replace(devices=RuntimeError("Unable to initialize backend 'tpu': UNAVAILABLE\nmore")), [], "[tpu]",
     f"JAX cannot use this runtime (Unable to initialize backend 'tpu': UNAVAILABLE): {RESTART}")])
def test_a_runtime_gets_the_extra_of_its_accelerator(faked, extras, package, line, install):
    assert install(faked, *extras) == (f"{ROOT}{package}", f"mmx: {line}")


def test_a_tpu_without_a_bus_is_found_by_colabs_variables(install, monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-1")
    assert install(TPU._replace(pci=GVNIC))[0] == f"{ROOT}[tpu]"


def test_a_failed_installation_reports_the_last_line_of_pip(install):
    assert install(GPU, pip_status=1)[1] == (f"mmx: {sys.executable} -m pip install --quiet {ROOT}[cuda12] failed: "
                                             "ERROR: No matching distribution found")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_clones_and_installs(path, monkeypatch):
    """Runs the first cell as IPython does, in Colab and elsewhere."""
    calls = []
    shell = types.SimpleNamespace(system=lambda line: calls.append(line),
                                  run_line_magic=lambda name, line: calls.append(f"%{name} {line}"))
    source = next(cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")
    cell = TransformerManager().transform_cell("".join(source))
    exec(cell, {"get_ipython": lambda: shell})
    assert calls == []
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(cell, {"get_ipython": lambda: shell})
    extras = {"03": " torch", "06": " tpu"}.get(path.name[:2], "")
    assert calls == ["%cd -q /content",
                     f"test -d mmx || git clone --quiet --depth 1 {SETTINGS['metadata']['url']} mmx",
                     "%cd -q mmx/notebooks", f"%run ../mmx/launch/runtime.py install{extras}"]


def test_the_address_is_written_everywhere(tmp_path):
    spec = importlib.util.spec_from_file_location("address", ROOT / "notebooks" / "address.py")
    address = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(address)
    (tmp_path / "notebooks").mkdir()
    for path in (*NOTEBOOKS, ROOT / "README.md", ROOT / "setup.cfg"):
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    assert address.write(tmp_path) == []        # the committed files have the address of setup.cfg
    old = SETTINGS["metadata"]["url"].removeprefix("https://github.com/")
    settings = tmp_path / "setup.cfg"
    settings.write_text(settings.read_text().replace(old, "example/mini-max.jax"))
    assert len(address.write(tmp_path)) == len(NOTEBOOKS) + 1
    for path in [*tmp_path.glob("notebooks/*.ipynb"), tmp_path / "README.md"]:
        text = path.read_text()
        assert old not in text and "github.com/example/mini-max.jax" in text
        json.loads(text) if path.suffix == ".ipynb" else None
    assert address.write(tmp_path) == []
    settings.write_text(settings.read_text().replace("https://github.com/", "https://gitlab.com/"))
    with pytest.raises(SystemExit, match="must be https://github.com/OWNER/NAME"):
        address.write(tmp_path)
