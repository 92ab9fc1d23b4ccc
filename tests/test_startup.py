"""What a program sets up before it imports JAX, in a separate process where it changes the process."""
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mmx.files import output
from mmx.startup import cache, devices, interrupts

ROOT = Path(__file__).parent.parent


def python(code: str, shell: str = "", **environment):
    """Runs Python code in a process; `shell` is appended to its command line."""
    return subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {shell}', sys.executable, code], capture_output=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, timeout=120)


@pytest.mark.case(20)
@pytest.mark.parametrize("closed", ["0<&-", "2>&-", "0<&- 2>&-"])
def test_closed_streams_are_replaced(closed, tmp_path):
    """The next file that is opened does not get the number of a closed stream, into which native code logs."""
    code = ("import os, sys\nfrom mmx.startup import streams\nstreams.prepare()\n"
            f"file = open({str(tmp_path / 'a')!r}, 'w')\nprint(file.fileno() > 2, sys.stdin.read(), file=sys.stdout)\n"
            "print('lost' if sys.stderr.name == 2 else 'shown', file=sys.stderr)\nos.write(2, b'native')")
    done = python(code, f"{closed} </dev/null" if "0<" not in closed else closed)
    assert (done.returncode, done.stdout) == (0, b"True \n") and (tmp_path / "a").read_text() == ""


@pytest.mark.case(20)
def test_library_calls_need_no_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(output.bar([1, 2])) == [1, 2] and list(output.bar([3], disable=None)) == [3]
    output.message("nobody reads it")
    assert capsys.readouterr().out == ""


@pytest.mark.case(23)
def test_characters_that_the_encoding_does_not_have_are_escaped():
    done = python("from mmx.startup import streams\nstreams.prepare()\nprint('\u00e9')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"\\xe9\n")


@pytest.mark.case(23)
def test_paths_in_an_ascii_locale(tmp_path):
    """PYTHONUTF8=0 and LC_ALL=C make Python's encoding of file names ASCII."""
    folder = tmp_path / "caf\u00e9"
    folder.mkdir()
    (folder / "tiny.py").write_text("from mmx.config import default as get_config\n")
    command = [sys.executable, "-m", "mmx.cli", "config", str(folder / "tiny.py")]
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, env=os.environ | ascii_locale)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode()
    assert "caf\u00e9" in done.stdout.decode()
    done = subprocess.run([*command[:-1], b"\xff.py"], capture_output=True, env=os.environ | ascii_locale)
    assert done.returncode == 2 and re.fullmatch(rb"mmx: no experiment file \S*\\udcff\.py.*\n", done.stderr), done.stderr


@pytest.mark.case(28)
@pytest.mark.parametrize("block, left", [("removing(path)", False), ("unwinding()", True)])
def test_an_interrupt_ends_the_program(block, left, tmp_path):
    """Temporary files are removed. In `unwinding`, KeyboardInterrupt is raised."""
    path = tmp_path / "file.partial"
    path.write_text("half")
    code = (f"import os, signal\nfrom mmx.startup import interrupts\ninterrupts.install()\npath = {str(path)!r}\n"
            f"try:\n  with interrupts.{block}:\n    os.kill(os.getpid(), signal.SIGINT)\n    print('not reached')\n"
            "except KeyboardInterrupt:\n  print('raised')")
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == ((0, b"raised\n", b"") if left else (130, b"", b"mmx: interrupted\n"))
    assert path.exists() == left


@pytest.mark.case(28)
def test_an_interrupt_during_an_import(tmp_path):
    """The handler is there before the first import, and is not lost in a module that catches every exception."""
    (tmp_path / "absl.py").write_text("import os, signal\ntry:\n  os.kill(os.getpid(), signal.SIGINT)\nexcept:\n  pass\n")
    done = python(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom mmx.cli import main\nsys.exit(main())")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"mmx: interrupted\n")


def test_an_ignored_interrupt_stays_ignored():
    """As in `nohup mmx train` or `mmx train &` of a script."""
    code = ("import os, signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom mmx.startup import interrupts\n"
            "interrupts.install()\nos.kill(os.getpid(), signal.SIGINT)\nprint('runs')")
    assert python(code).stdout == b"runs\n"


def test_signals_are_handled_in_the_main_thread_only():
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.handling(signal.SIG_IGN, signal.SIGTERM):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == before


CPU = "processor\t: 0\nmodel name\t: A\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: other\n"


def test_programs_of_different_processors_are_apart(tmp_path, monkeypatch):
    def folder(mhz, flags):
        (tmp_path / "cpuinfo").write_text(CPU.format(mhz=mhz, flags=flags))
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        described = processor(str(tmp_path / "cpuinfo"))
        monkeypatch.setattr(cache, "processor", lambda: described)
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        cache.enable(tmp_path)
        return os.environ["JAX_COMPILATION_CACHE_DIR"]
    processor = cache.processor
    assert folder(1000, "sse avx") == folder(2000, "sse avx") != folder(1000, "sse avx avx512f")
    assert processor(str(tmp_path / "missing")) != ""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    cache.enable(tmp_path)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_old_programs_are_deleted(tmp_path):
    (tmp_path / "cpu").mkdir()
    for age, name in enumerate("abcd"):
        path = tmp_path / "cpu" / name
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))        # d is the oldest
    cache.prune(tmp_path, 400)
    assert len(list((tmp_path / "cpu").iterdir())) == 4
    cache.prune(tmp_path, 399)      # above it, so half is left: a
    assert [path.name for path in (tmp_path / "cpu").iterdir()] == ["a"]


RUN = """
from mmx import startup
startup.prepare()
import jax, jax.numpy as jnp, hashlib, json
from mmx.kernels.lightning import lightning_attention
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 2, 64, 8))
found = jax.jit(jax.value_and_grad(lambda q: jnp.sum(jnp.sin(lightning_attention(q, k, v, jnp.full(2, 0.1))[0]))))(q)
print(hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(jax.device_get(found)))).hexdigest())
"""


def test_the_cache_is_silent_and_gives_the_same_bits(tmp_path):
    """The second process compiles nothing; the third replaces programs that are damaged."""
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": "",
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    code = "import os\ndel os.environ['JAX_COMPILATION_CACHE_DIR']\n" + RUN
    runs, files = [], []
    for number in range(3):
        runs.append(python(code, **environment))
        assert runs[-1].returncode == 0 and runs[-1].stderr == b"", runs[-1].stderr.decode()
        files.append({path.name: path.stat().st_size for path in tmp_path.glob("mmx/programs/*/*-cache")})
        if number == 1:
            for path in tmp_path.glob("mmx/programs/*/*-cache"):
                path.write_bytes(path.read_bytes()[:50])
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout and len(runs[0].stdout) == 65
    assert files[0] and files[0].keys() == files[1].keys() == files[2].keys() and min(files[2].values()) > 50


@pytest.mark.case(35)
def test_an_installed_plugin_is_silent(tmp_path, monkeypatch):
    """Known lines of native code are dropped, others are shown; the module works."""
    (tmp_path / "jax_cuda99_plugin.py").write_text(
        "import os\nos.write(2, b'WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n"
        "I0000 00:00:1.2 7 cudart_stub.cc:31] Could not find cuda drivers on your machine\\nother\\n')\n"
        "def initialize():\n  os.write(2, b'I0000 00:00:1.2 7 cudart_stub.cc:31] Could not\\n')\n")
    code = (f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom mmx.startup import devices\n"
            "devices.has_accelerator = lambda: False\ndevices.prepare()\nimport jax_cuda99_plugin as p\np.initialize()\n"
            "import os, json\nprint(json.dumps([os.environ.get('JAX_PLATFORMS'), p.__name__]))")
    done = python(code, JAX_PLATFORMS="cuda,cpu")
    assert done.stderr == b"other\n" and json.loads(done.stdout) == ["cuda,cpu", "jax_cuda99_plugin"]
    monkeypatch.setattr(devices, "DEVICE_FILES", (str(tmp_path / "nvidia*"),))
    monkeypatch.setattr(devices, "REMOTE", ("NO_SUCH_",))
    assert not devices.has_accelerator()
    (tmp_path / "nvidia0").touch()
    assert devices.has_accelerator()
