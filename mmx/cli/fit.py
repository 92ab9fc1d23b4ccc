"""`mmx fit`: fits scaling laws to runs."""
from pathlib import Path

from mmx.cli import common

LAWS = """\
laws (C: training FLOPs, N: parameters, D: training tokens, L: loss):
  power       L(C) = a C^-b
  envelope    the same law, fitted to the best run of each compute budget, except where a cheaper
              run has a lower loss
  chinchilla  L(N, D) = E + A / N^alpha + B / D^beta; also N_opt(C) and D_opt(C)
  isoflop     N_opt(C) and D_opt(C), from the minimum of a parabola for each compute budget
  moe         L(P, T|E) = d + a P^alpha + b T^beta + c (P T)^gamma
              (P: activated parameters, T: training tokens, E: number of experts)
Without a column of FLOPs, FLOPs = 6 * params * tokens. Without a column of tokens,
tokens = FLOPs / (6 * params). The output reports this."""
COLUMNS = {"params": "parameters, or with moe the activated parameters", "tokens": "training tokens", "flops": "training FLOPs",
           "loss": "final loss"}


def add_parser(commands) -> None:
    parser = common.add_command(commands, "fit", run, "Fit a scaling law to runs.",
                                "Prints a table with bootstrap confidence intervals and draws a plot.", epilog=LAWS)
    parser.add_argument("file", metavar="FILE",
                        help="runs.jsonl with one JSON object for each run, or a CSV file with a header")
    parser.add_argument("--law", required=True, choices=["power", "envelope", "chinchilla", "isoflop", "moe"],
                        help="law to fit; see below")
    for name, meaning in COLUMNS.items():
        parser.add_argument(f"--{name}", metavar="COL", help=f"column that contains the {meaning} (default: {name})")
    parser.add_argument("--by", action="append", default=[], metavar="COL",
                        help="fit the runs of each value of this column separately; may be given several times (default: "
                        "arch, and for moe also experts, if they exist)")
    parser.add_argument("--irreducible", action="store_true",
                        help="power and envelope: add a constant to the law, L(C) = E + a C^-b")
    parser.add_argument("--tolerance", type=float, default=0.2, metavar="SHARE", help="envelope and isoflop: FLOPs that differ "
                        "by a smaller share belong to one compute budget (default %(default)s)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N",
                        help="number of bootstrap resamples (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples (default %(default)s)")
    parser.add_argument("--out", default=".", metavar="DIR",
                        help="directory for fit.png, which shows the fit and its residuals (default %(default)s)")
    common.add_json(parser)


def run(args):
    from mmx.analysis import scaling_report

    report, fits = scaling_report.run(
        args.file, args.law, {name: getattr(args, name) for name in COLUMNS}, args.by,
        irreducible=args.irreducible, tolerance=args.tolerance, resamples=args.bootstrap, seed=args.seed)
    plot = scaling_report.plot(fits, args.law, report["formula"], Path(args.out) / "fit.png")
    if args.json:
        common.print_json(report)
        return
    scaling_report.show(report)
    print(f"plot: {plot}")
