"""`make fuzz N=100000`: hostile files for every reader, in child processes with limits, and a table of what became of them.

    python tests/fuzz/fuzz.py --n 100000 [--only released,images] [--seed 0] [--found DIR]

A child reads inputs one by one. Found is: an exception that is no ConfigError of one line, SECONDS of processor time for one
input, MEMORY above the start, a file written, a program started, a pickle read, a connection made (by Python's audit
events), and the end of the process. The input of each is kept in DIR.
"""
import argparse
import collections
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECONDS, WALL = 5, 60           # of one input: processor time, and time by the clock (one that waits for ever)
MEMORY = 1 << 30                # above the start, of one child
ROUND = 2000                    # inputs of one child
MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None       # a disk takes longer than the readers
SECRET = "hexenschuss"          # stands in a folder that no reader may look into
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
             "socket.connect", "ctypes.dlopen", "os.symlink", "os.link")
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.copyfile", "shutil.move",
          "shutil.rmtree")


class BrokenError(Exception):
    """What an input did that no input may do."""


def check(read, folder: Path) -> str:
    """What a reader said of a folder, "read" if nothing; raises BrokenError."""
    from mmx.config import ConfigError
    from mmx.files.untrusted import MESSAGE_LENGTH

    begun = time.process_time()
    try:
        read(folder)
        said = "read"
    except ConfigError as error:
        said = str(error)
        if "\n" in said.strip() or len(said) > 100 * MESSAGE_LENGTH:
            raise BrokenError(f"many words: {said[:200]!r}") from error
    except OSError as error:        # the command line tells it in one line
        said = error.strerror or str(error)
    if time.process_time() - begun > SECONDS:
        raise BrokenError(f"{time.process_time() - begun:.1f} s")
    return said


def watch(allowed: Path):
    """(what was seen, whether to look): Python's audit events of what no reader does."""
    seen, looking = [], [False]

    def hook(event, args):
        if not looking[0]:
            return
        wrong = event in FORBIDDEN
        if event == "open" and isinstance(args[0], (str, bytes)):
            mode, flags = args[1], args[2] or 0
            writes = any(c in (mode or "") for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            wrong = writes and not _below(args[0], allowed)
        elif event in WRITES:
            wrong = not _below(args[0], allowed)
        elif event == "exec" and args[0].co_filename.startswith(str(allowed)):
            wrong = True
        if wrong:
            seen.append(f"{event} {str(args[0])[:200]}")

    sys.addaudithook(hook)
    return seen, looking


def _below(path, folder: Path) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and Path(os.path.realpath(os.fsdecode(path))).is_relative_to(folder)


def child(name: str, count: int, seed: int, folder: Path):
    """Reads the inputs behind `seed`, `count` of them; a line of JSON for each outcome, and for each beginning the number, on
    stdout."""
    import hostile
    import parsers

    files, read = parsers.PARSERS[name]
    whole = files()
    (folder / "outside").mkdir(exist_ok=True)
    (folder / "outside" / "secret").write_text(json.dumps({SECRET: SECRET}))
    clean = folder / "whole"
    for path, raw in whole.items():
        (clean / path).parent.mkdir(parents=True, exist_ok=True)
        (clean / path).write_bytes(raw)
    assert check(read, clean) == "read", name       # and what reading needs is loaded
    outcomes = collections.Counter()
    at, (seen, looking) = folder / "input", watch(folder)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, resource.RLIM_INFINITY))

    for number in range(1, count + 1):
        print(f"begin {number}", flush=True)
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        hostile.folder(random.Random(seed + number), whole, at, folder / "outside")
        looking[0] = True
        try:
            said = kind(check(read, at), folder)
            outcomes[said] += 1
            problem = seen[0] if seen else "what stands in another folder was told" if SECRET in said else ""
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            problem = f"{type(error).__name__}: {error}"
        finally:
            looking[0] = False
        if not problem and (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - start) > MEMORY:
            problem = f"{grown >> 20} MB"
        if problem:
            seen.clear()
            keep(at, folder / f"found{number}")
            print("found " + json.dumps(problem[:500]), flush=True)
            if problem.endswith("MB"):
                os._exit(3)
    print("done " + json.dumps(outcomes.most_common()), flush=True)


def kind(said: str, folder: Path) -> str:
    """An error without what differs from input to input."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[\d.,]+|\S*/\S*", "~", said)[:60]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000, help="inputs in all (default 10,000)")
    parser.add_argument("--only", default="", help="readers, with commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where inputs that broke something are kept")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], int(args.child[1]), int(args.child[2]), Path(args.child[3]))
    import parsers
    names = args.only.split(",") if args.only else list(parsers.PARSERS)
    print(f"{'reader':12} {'inputs':>8} {'errors':>8} {'found':>6} {'seconds':>8}", flush=True)
    total = 0
    for name in names:
        begun = time.monotonic()
        done, outcomes, found = fuzz(name, -(-args.n // len(names)), args.seed, args.found)
        total += found
        print(f"{name:12} {done:8,} {len(outcomes):8,} {found:6,} {time.monotonic() - begun:8.0f}", flush=True)
    return int(total > 0)


def fuzz(name: str, count: int, seed: int, found_in: Path):
    """(inputs, outcomes, found) of one reader."""
    done, outcomes, found = 0, collections.Counter(), 0
    while done < count:
        with tempfile.TemporaryDirectory(prefix="mmx-fuzz-", dir=MEMORY_DISK) as place:
            read, told, problem = one_child(name, min(ROUND, count - done), seed * 1_000_000_007 + done, Path(place), found_in)
        if not read:        # whole files are not read
            return done, outcomes, found + problem
        done += read
        outcomes.update(told)
        found += problem
    return done, outcomes, found


def keep(folder: Path, to: Path):
    """Copies an input, but for its pipes."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    if folder.exists():
        shutil.copytree(folder, to, symlinks=True, dirs_exist_ok=True,
                        ignore=lambda at, names: [name for name in names if (Path(at) / name).is_fifo()])


def one_child(name, count, seed, place: Path, found_in: Path):
    environment = os.environ | {"HOME": str(place / "home"), "TMPDIR": str(place), "JAX_PLATFORMS": "cpu",
                                "RUST_BACKTRACE": "0",
                                "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    (place / "home").mkdir()
    (place / "cwd").mkdir()
    errors = (place / "stderr").open("w+")
    process = subprocess.Popen([sys.executable, __file__, "--child", name, str(count), str(seed), str(place)],
                               cwd=place / "cwd", stdout=subprocess.PIPE, stderr=errors, env=environment)
    os.set_blocking(process.stdout.fileno(), False)
    read, outcomes, found, text, ended = 0, {}, 0, b"", False
    since = used = None

    def keep_input(problem):
        nonlocal found
        found += 1
        folder, kept = found_in / f"{name}-{seed}-{read}", place / f"found{read}"
        keep(kept if kept.exists() else place / "input", folder)
        (folder / "FOUND").write_text(problem + "\n")
        print(f"  found: {name} {read}: {problem[-300:]}", flush=True)

    while True:
        piece = process.stdout.read()
        text += piece or b""
        *lines, text = text.split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "begin":
                read, since, used = int(rest), time.monotonic(), cpu(process.pid)
            elif word == "found":
                keep_input(json.loads(rest))
            elif word == "done":
                outcomes, ended, since = dict(json.loads(rest)), True, None
        if piece == b"" and process.poll() is not None:
            break
        now = cpu(process.pid)
        if since and now is not None and used is not None and (now - used > 2 * SECONDS or time.monotonic() - since > WALL):
            keep_input(f"hang: {now - used:.0f} s of processor time, {time.monotonic() - since:.0f} s by the clock")
            process.kill()
            process.wait()
            return read, outcomes, found
        if piece is None:
            time.sleep(0.02)
    errors.seek(0)
    if not ended and process.returncode != 3:
        keep_input(f"ended with {process.returncode}: {errors.read()[-400:]}")
    return (read if not ended else count), outcomes, found


def cpu(pid: int) -> float | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
