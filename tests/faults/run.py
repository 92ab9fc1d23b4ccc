"""Runs the fault scenarios and prints a table: `make faults N=100 MEMORY_SECONDS=3600 ONLY=kills,elastic`."""
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
    parser.add_argument("--n", type=int, default=100, help="SIGKILLs; elastic restarts are a fifth of it (default 100)")
    parser.add_argument("--memory-seconds", type=float, default=60, help="training time of that scenario (default 60)")
    parser.add_argument("--seconds", type=float, default=1e9, help="limit for kills and restarts, which --folder continues")
    parser.add_argument("--only", help="names of scenarios, separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="keep the runs in this folder (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        folder = Path(args.folder or folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= harness.settings(folder)
        return run(args, folder)


def run(args, folder: Path) -> int:
    import interrupts
    import scenarios as s
    from rich.console import Console
    from rich.table import Table

    rng, few, kill = random.Random(args.seed), max(1, args.n // 5), s.signal.SIGKILL

    def workspace(name, steps=60, **options):
        return harness.Workspace(folder / name, steps, **options)
    scenarios = {
        "kills": ("SIGKILL anywhere in one run", lambda: s.kills(
            workspace("kills"), [kill] * args.n, rng, args.seconds)),
        "signals": ("SIGTERM, SIGSTOP, SIGKILL", lambda: s.kills(
            workspace("signals"), rng.choices((s.signal.SIGTERM, s.signal.SIGSTOP, kill), k=few), rng,
            args.seconds)),
        "damage": ("damaged bytes in a checkpoint", lambda: s.damage(workspace("files"), max(200, 5 * args.n), rng)),
        "disk": ("full disk", lambda: s.full_disk(workspace("files"))),
        "write": ("a write that fails during a save", lambda: s.short_files(workspace("files"))),
        "read-only": ("read-only directory", lambda: s.read_only(workspace("files"))),
        "two": ("two runs on one workdir", lambda: s.two_runs(workspace("files"))),
        "clock": ("clock that jumps", lambda: s.clock(workspace("files"))),
        "ranks": ("one of two processes killed", lambda: s.ranks(workspace("files"))),
        "elastic": ("elastic restarts, float64", lambda: s.elastic(
            workspace("e64", dtype="float64"), few, rng, args.seconds)),
        "elastic32": ("elastic restarts, float32, first loss", lambda: s.elastic(
            workspace("e32"), few, rng, args.seconds)),
        "interrupts": ("Ctrl-C during imports, compilation and steps", lambda: interrupts.interrupts(
            workspace("files"), args.n, rng)),
        "memory": ("memory over time", lambda: s.memory(workspace("files"), args.memory_seconds)),
    }
    table, failed = Table("scenario", "passed", "seconds", "result"), False
    for name in args.only.split(",") if args.only else scenarios:
        what, function = scenarios[name]
        start = time.monotonic()
        try:
            passed, result = "yes", function()
        except Exception as error:
            traceback.print_exc()
            passed, result, failed = "NO", " ".join(str(error).split())[:500], True
        table.add_row(what, passed, f"{time.monotonic() - start:.0f}", result)
        print(f"{what}: {passed}, {result}", file=sys.stderr)
    Console(width=140).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
