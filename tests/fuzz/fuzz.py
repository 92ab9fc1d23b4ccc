"""`make fuzz N=100000`: every reader reads hostile files, in child processes with limits; prints a table of the outcomes.

    python tests/fuzz/fuzz.py --n 100000 [--only released,images] [--seed 0] [--found DIR]

A child process reads inputs one by one. A defect is an exception other than a ConfigError of one line, more than SECONDS of
processor time for one input, memory use of more than MEMORY above the start, a crash, or (seen in Python's audit events) a file
written, a program started, a pickle read or a connection opened. Inputs that cause defects are kept in DIR.
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
SECONDS, WALL = 5, 60           # for one input: processor time, and time by the clock, for a reader that waits forever
MEMORY = 1 << 30                # [bytes] of one child above its start
ROUND = 2000                    # inputs of one child
MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None       # a disk would be slower than the readers
SECRET = "hexenschuss"          # contents of a file in a folder that no reader may read
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
             "socket.connect", "ctypes.dlopen", "os.symlink", "os.link")
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.copyfile", "shutil.move",
          "shutil.rmtree")


class DefectError(Exception):
    """A reader did what no input may cause."""


def check(read, folder: Path) -> str:
    """Reads a folder. Returns the error message, or "read" if there was none; raises DefectError."""
    from mmx.config import ConfigError
    from mmx.files.untrusted import MESSAGE_LENGTH

    start = time.process_time()
    try:
        read(folder)
        outcome = "read"
    except ConfigError as error:
        outcome = str(error)
        if "\n" in outcome.strip() or len(outcome) > 100 * MESSAGE_LENGTH:
            raise DefectError(f"a long message: {outcome[:200]!r}") from error
    except OSError as error:        # the command line reports it in one line
        outcome = error.strerror or str(error)
    if time.process_time() - start > SECONDS:
        raise DefectError(f"{time.process_time() - start:.1f} s")
    return outcome


def watch(allowed: Path):
    """Records Python's audit events that no reader may cause. Returns (events, enabled); enabled[0] switches recording on."""
    events, enabled = [], [False]

    def hook(event, args):
        if not enabled[0]:
            return
        forbidden = event in FORBIDDEN
        if event == "open" and isinstance(args[0], (str, bytes)):
            mode, flags = args[1], args[2] or 0
            writes = any(c in (mode or "") for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            forbidden = writes and not _below(args[0], allowed)
        elif event in WRITES:
            forbidden = not _below(args[0], allowed)
        elif event == "exec" and args[0].co_filename.startswith(str(allowed)):
            forbidden = True
        if forbidden:
            events.append(f"{event} {str(args[0])[:200]}")

    sys.addaudithook(hook)
    return events, enabled


def _below(path, folder: Path) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and Path(os.path.realpath(os.fsdecode(path))).is_relative_to(folder)


def child(name: str, count: int, seed: int, folder: Path):
    """Reads inputs number 1 to `count` of `seed`. Prints a line when one begins, one for each defect, and one at the end."""
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
    assert check(read, clean) == "read", name       # this also imports what the reader needs
    outcomes = collections.Counter()
    place, (events, enabled) = folder / "input", watch(folder)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, resource.RLIM_INFINITY))

    for number in range(1, count + 1):
        print(f"begin {number}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        hostile.folder(random.Random(seed + number), whole, place, folder / "outside")
        enabled[0] = True
        try:
            outcome = kind(check(read, place))
            outcomes[outcome] += 1
            problem = events[0] if events else "a message contains a file of another folder" if SECRET in outcome else ""
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            problem = f"{type(error).__name__}: {error}"
        finally:
            enabled[0] = False
        if not problem and (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - start) > MEMORY:
            problem = f"{grown >> 20} MB"
        if problem:
            events.clear()
            keep(place, folder / f"found{number}")
            print("found " + json.dumps(problem[:500]), flush=True)
            if problem.endswith("MB"):
                os._exit(3)
    print("done " + json.dumps(outcomes.most_common()), flush=True)


def kind(message: str) -> str:
    """A message without its names, numbers and paths, which differ from input to input."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|[\d.,]+|\S*/\S*", "~", message)[:100]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000, help="number of inputs of all readers together (default 10,000)")
    parser.add_argument("--only", default="", help="readers, separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder for the inputs that cause defects")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], int(args.child[1]), int(args.child[2]), Path(args.child[3]))
    import parsers
    names = args.only.split(",") if args.only else list(parsers.PARSERS)
    print(f"{'reader':12} {'inputs':>8} {'errors':>8} {'found':>6} {'seconds':>8}", flush=True)
    total = 0
    for name in names:
        start = time.monotonic()
        done, outcomes, found = fuzz(name, -(-args.n // len(names)), args.seed, args.found)
        total += found
        print(f"{name:12} {done:8,} {len(outcomes):8,} {found:6,} {time.monotonic() - start:8.0f}", flush=True)
    return int(total > 0)


def fuzz(name: str, count: int, seed: int, found_in: Path):
    """(inputs read, outcomes, number of defects) of one reader."""
    done, outcomes, found = 0, collections.Counter(), 0
    while done < count:
        with tempfile.TemporaryDirectory(prefix="mmx-fuzz-", dir=MEMORY_DISK) as place:
            read, counts, defects = one_child(name, min(ROUND, count - done), seed * 1_000_000_007 + done, Path(place),
                                              found_in)
        if not read:        # even the valid files are not read
            return done, outcomes, found + defects
        done += read
        outcomes.update(counts)
        found += defects
    return done, outcomes, found


def keep(folder: Path, to: Path):
    """Copies an input without its pipes."""
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
