"""`mmx aot`: compiles an experiment ahead of time for a pod, without the pod's hardware."""
from mmx.cli import common
from mmx.config import ConfigError


def add_parser(commands) -> None:
    parser = common.add_command(commands, "aot", run, "Compile an experiment for a pod, without the pod's hardware.",
                                "Prints whether the program fits into memory, its collectives and its FLOPs.",
                                accepts_overrides=True, epilog=common.OVERRIDES)
    common.add_experiment(parser)
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE",
                        help="v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, tpu7x:AxBxC or h100:HOSTSx8")
    parser.add_argument("--mesh", metavar="AXES",
                        help="mesh axes, for example edp=16,ep=32; axes that are not named are 1 (default: the experiment's)")
    parser.add_argument("--slices", type=int, default=1, metavar="N",
                        help="number of such slices, connected by the data-center network (default %(default)s)")
    parser.add_argument("--mode", choices=["train", "prefill", "decode"], default="train",
                        help="train: one training step; prefill: train.batch prompts of train.length tokens; decode: one token "
                        "after each of these prompts (default %(default)s)")
    parser.add_argument("--search", action="store_true",
                        help="rank all meshes by an analytic model of memory and time, and compile the best ones")
    parser.add_argument("--best", type=int, default=3, metavar="N",
                        help="number of meshes that --search compiles (default %(default)s)")
    parser.add_argument("--out", default=".", metavar="DIR",
                        help="directory for search.png of --search, a plot of time over memory (default %(default)s)")
    common.add_json(parser)


def run(args):
    experiment = common.read_experiment(args.config, args.overrides)
    if args.search and args.mesh:
        raise ConfigError(f"--mesh {args.mesh} cannot be combined with --search, which chooses the mesh")
    from mmx.compilers import aot, search

    if args.search:
        report, show = search.run(experiment, args.topology, args.mode, args.slices, args.best, args.out), search.show
    else:
        report, show = aot.run(experiment, args.topology, args.mesh, args.mode, args.slices), aot.show
    if args.json:
        common.print_json(report)
    else:
        show(report)
