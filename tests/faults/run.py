"""`make faults N=100 MEMORY_SECONDS=3600 ONLY=kills,elastic`: the harness for longer than the suite has; prints a table."""
import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import harness


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="SIGKILLs; a fifth as many elastic restarts (default 100)")
    parser.add_argument("--memory-seconds", type=float, default=60, help="of training whose memory is watched (default 60)")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which kills, restarts stop; with --folder they go on")
    parser.add_argument("--only", help="names with commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where runs are (default: one that is removed)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        folder = Path(args.folder or folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= harness.settings(folder)
        return run(args, folder)


def run(args, folder: Path) -> int:
    import scenarios as s
    from rich.console import Console
    from rich.table import Table

    rng, few, kill = random.Random(args.seed), max(1, args.n // 5), s.signal.SIGKILL
    known = {
        "kills": ("SIGKILL anywhere in one run", lambda: s.kills(
            harness.Place(folder / "kills", 20 * args.n), [kill] * args.n, rng, args.seconds)),
        "signals": ("SIGTERM, SIGSTOP, SIGKILL", lambda: s.kills(
            harness.Place(folder / "signals", 20 * few), rng.choices((s.signal.SIGTERM, s.signal.SIGSTOP, kill), k=few), rng,
            args.seconds)),
        "damage": ("bytes of a checkpoint", lambda: s.damage(harness.Place(folder / "files"), max(200, 5 * args.n), rng)),
        "disk": ("full disk", lambda: s.full_disk(harness.Place(folder / "files"))),
        "write": ("a write that fails amid a save", lambda: s.short_files(harness.Place(folder / "files"))),
        "read-only": ("read-only directory", lambda: s.read_only(harness.Place(folder / "files"))),
        "two": ("two runs on one workdir", lambda: s.two_runs(harness.Place(folder / "files"))),
        "clock": ("clock that leaps", lambda: s.clock(harness.Place(folder / "files"))),
        "ranks": ("one of two processes killed", lambda: s.ranks(harness.Place(folder / "files"))),
        "elastic": ("elastic restarts, float64", lambda: s.elastic(
            harness.Place(folder / "e64", dtype="float64"), few, rng, args.seconds)),
        "elastic32": ("elastic restarts, float32, first loss", lambda: s.elastic(
            harness.Place(folder / "e32"), few, rng, args.seconds)),
        "memory": ("memory over time", lambda: s.memory(harness.Place(folder / "files"), args.memory_seconds)),
    }
    table, failed = Table("what", "held", "seconds", "found"), False
    for name in args.only.split(",") if args.only else known:
        what, function = known[name]
        begun = time.monotonic()
        try:
            held, found = "yes", function()
        except Exception as error:
            traceback.print_exc()
            held, found, failed = "NO", " ".join(str(error).split())[:500], True
        table.add_row(what, held, f"{time.monotonic() - begun:.0f}", found)
        print(f"{what}: {held}, {found}", file=sys.stderr)
    Console(width=140).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
