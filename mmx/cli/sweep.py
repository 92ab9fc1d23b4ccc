"""`mmx sweep`: runs a grid of experiments."""
from pathlib import Path

from mmx.cli import common, errors
from mmx.config import ConfigError
from mmx.launch import experiments

GRID = """\
FILE defines sweep() in addition to get_config(). sweep() returns one of these:
  a dict that maps each key to a list of values; the grid is their product
  a list of dicts, one for each run
A key with a dot is a config key (train.lr). A key without a dot is an argument of
get_config(). DIR/runs.jsonl contains one row for each finished run. To resume a sweep, run
the same command again; finished runs are not repeated.

"""


def add_parser(commands) -> None:
    parser = common.add_command(commands, "sweep", run, "Train a grid of runs and collect one row of results for each run.",
                                accepts_overrides=True, epilog=GRID + common.OVERRIDES)
    parser.add_argument("--config", required=True, metavar="FILE",
                        help="experiment file that defines sweep(), for example experiments/scaling.py")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help="directory for runs.jsonl, runs/NAME (working directories) and jobs/ (logs)")
    parser.add_argument("--executor", choices=["inline", "local", "slurm"], default="local",
                        help="train in this process, in processes on this machine, or in SLURM jobs (default %(default)s)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at the same time (default: 1, or 64 with slurm)")
    parser.add_argument("--slurm", default="", metavar="KEY=VALUE", help="options of sbatch, separated by commas: "
                        "partition=gpu,gpus_per_node=8,time=600 (in minutes; default 1440)")
    parser.add_argument("--retries", type=int, default=1, metavar="N",
                        help="how often to retry a failed run (default %(default)s)")
    parser.add_argument("--hours", type=float, metavar="H", help="refuse to start if the sweep is expected to take longer")
    parser.add_argument("--rate", type=float, metavar="FLOPS", help="FLOPs per second of one run, for the estimate of the "
                        "duration (default: as in the finished runs in DIR; without any, measured before the first run, "
                        "except with slurm)")


def run(args):
    common.check_minimums(args, jobs=1, retries=0, hours=0, rate=1)
    if args.executor == "inline" and (args.jobs or 1) > 1:
        raise ConfigError(f"--jobs {args.jobs} needs --executor local or slurm: inline trains one run after another")
    grid, make = experiments.grid(args.config, args.overrides)
    from mmx.launch import sweep

    cells = sweep.cells(grid, lambda keys: common.check_experiment(make(keys)))
    options = sweep.ExecutorOptions(args.executor, args.jobs, args.slurm)
    failed = sweep.run(cells, args.out, options, retries=args.retries, hours=args.hours, flops_per_s=args.rate,
                       title=args.config)
    out = Path(args.out)
    print(f"written: {out / 'runs.jsonl'}; to compare the runs: tensorboard --logdir {out / 'runs'}")
    if failed:
        name, reason = next(iter(failed.items()))
        return errors.report(f"{len(failed)} run{'s' * (len(failed) > 1)} failed; run the same command to retry. "
                             f"The first failure is {name}: {reason}", 1)
