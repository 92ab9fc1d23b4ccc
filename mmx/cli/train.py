"""`mmx train`: trains an experiment, in one process or in several."""
import functools
import signal
import sys

from mmx.cli import common, errors
from mmx.launch import processes

PROCESSES = """\
mmx detects the processes of SLURM, Open MPI, Kubernetes and TPU pods. Elsewhere, give
these flags to each process. All processes must be able to read and write --workdir.
SIGTERM to one process makes all of them save a checkpoint and stop at the same step.
Exit code 2: not all processes could start. Exit code 3: a process died or left; the
others report this within a minute, and training can resume from the last checkpoint."""


def add_parser(commands) -> None:
    parser = common.add_command(commands, "train", run, "Train an experiment, or resume its training.",
                                accepts_overrides=True, epilog=common.OVERRIDES)
    common.add_experiment(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR",
                        help="directory for checkpoints, metrics.jsonl and TensorBoard files")
    group = parser.add_argument_group("several processes", PROCESSES)
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with a free port")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument("--timeout", type=int, default=300, metavar="SECONDS",
                       help="how long to wait for all processes to start, in seconds (default %(default)s)")


def run(args):
    world = processes.find_world(args.coordinator, args.processes, args.process, args.timeout)
    if not world:
        return _train(args)
    if sys.stderr.isatty() and (advice := processes.advice(world)):     # processes of a launcher have no terminal
        print(f"mmx: waiting up to {args.timeout} s for the other processes{advice}", file=sys.stderr)
    return processes.supervise(world, lambda: errors.run(functools.partial(_train, world=world), args))


def _train(args, world=None):
    experiment = common.read_experiment(args.config, args.overrides)
    if world:
        processes.join(world)
    from mmx.inference import engine
    from mmx.training.run import train

    result = train(experiment, args.workdir, sample=engine.sample, processes=(world and world.processes) or 1)
    if result["process"]:       # only process 0 prints
        return 0
    step = result["step"]
    if result["stopped"]:
        saved = " and saved a checkpoint" if step else ""
        print(f"stopped at step {step:,}{saved}; run the same command to resume")
        return errors.INTERRUPTED if result["stopped"] == signal.SIGINT else 0
    earlier = "" if result["new"] else " in an earlier run, so nothing is left to do"
    skipped = f", {result['skipped']:,} of them skipped because they were not finite" if result["skipped"] else ""
    print(f"trained {step:,} steps in {result['seconds']:.0f} s{skipped}{earlier}; "
          f"checkpoints, metrics.jsonl and TensorBoard files are in {args.workdir}")
    return 0
