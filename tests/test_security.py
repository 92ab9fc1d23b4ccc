"""mmx loads no pickles, runs no code from a checkpoint, and writes only to the directories that the user names."""
import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "mmx").rglob("*.py"))
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
RUN = {"eval", "exec", "compile", "__import__", "execfile"}
RUNPY = {"experiments.py"}      # runs experiment files: Python files that the user names on the command line


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_executes_text(path):
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
            assert not names & PICKLES, where
            assert "runpy" not in names or path.name in RUNPY, where
        elif isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] not in PICKLES | {"runpy"}, where
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            options = {option.arg: getattr(option.value, "value", ...) for option in node.keywords}
            assert not (isinstance(node.func, ast.Name) and name in RUN), where
            assert not (owner == "torch" and name == "load"), where
            assert options.get("allow_pickle", False) is options.get("trust_remote_code", False) is False, where
            assert not (owner in ("np", "numpy") and name == "load") or options.get("allow_pickle") is False, where
            assert name != "from_pretrained" or (options["use_safetensors"], options["trust_remote_code"]) == (True, False)
            assert not options.get("shell"), where


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_converting_a_checkpoint_runs_no_code_from_it(tmp_path):
    """The checkpoint contains auto_map with its modules, and pickles under all names that other loaders read."""
    from mmx.checkpoints import convert

    hf, out, trap = tmp_path / "hf", tmp_path / "run", tmp_path / "trap"
    shutil.copytree(ROOT / "tests" / "oracles" / "c_partial_orig" / "ckpt", hf)
    text = json.loads((hf / "config.json").read_text())
    names = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    (hf / "config.json").write_text(json.dumps(text | {"auto_map": names, "custom_pipelines": {"x": {"impl": "modeling_x.X"}}}))
    (hf / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["modeling_x.X", None]}}))
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py", "conftest.py", "sitecustomize.py"):
        (hf / name).write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    for name in ("pytorch_model.bin", "model.pkl", "adapter_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt"):
        (hf / name).write_bytes(pickle.dumps(Bomb(str(trap))))
    convert.from_hf(hf, out, progress=False)
    convert.load(hf)
    convert.to_hf(out, tmp_path / "back", progress=False)
    assert not trap.exists()
    assert not {path.suffix for path in (tmp_path / "back").iterdir()} & {".py", ".bin", ".pkl", ".pt"}
    pickle.loads((hf / "model.pkl").read_bytes())
    assert trap.exists()        # the pickle does run code if something loads it


def test_commands_write_only_below_out(tmp_path):
    """Commands that run in an empty home and an empty directory create files only below --out."""
    home, cwd, temporary, out = (tmp_path / name for name in ("home", "cwd", "tmp", "out"))
    for folder in (home, cwd, temporary, out):
        folder.mkdir()
    ckpt = ROOT / "tests" / "oracles" / "c_partial_orig" / "ckpt"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(home),
                   "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for command in (("convert", "from-hf", "--checkpoint", ckpt, "--out", out / "run"),
                    ("memory", "--config", ROOT / "experiments" / "text_01.py", "--out", out)):
        done = subprocess.run([sys.executable, "-m", "mmx.cli", *map(str, command)], cwd=cwd, env=environment, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
    created = sorted(str(path.relative_to(tmp_path)) for folder in (home, cwd, temporary) for path in folder.rglob("*")
                      if path.is_file())
    caches = ("home/.cache/matplotlib", "home/.config/matplotlib", "tmp/matplotlib")      # files of matplotlib itself
    assert [path for path in created if not path.startswith(caches)] == []
    assert (out / "run" / "config.json").exists() and (out / "memory.png").exists()
