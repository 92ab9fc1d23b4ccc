"""`mmx config`: prints an experiment's shapes, parameters and FLOPs."""
from rich.table import Table

from mmx.cli import common
from mmx.config import Experiment
from mmx.files import output


def add_parser(commands) -> None:
    parser = common.add_command(commands, "config", run, "Print the shapes, parameters and FLOPs of an experiment.",
                                accepts_overrides=True, epilog=common.OVERRIDES)
    common.add_experiment(parser, positional=True)
    parser.add_argument("--compiled", metavar="CHIP:SHAPE", help="also count the FLOPs of a training step compiled for this "
                        "pod, for example v5p:2x2x1 (see `mmx aot --help`)")
    common.add_json(parser)


def run(args):
    experiment = common.read_experiment(args.config, args.overrides)
    counts = count(experiment, args.compiled)
    if args.json:
        common.print_json(counts)
        return
    table = Table("", "", title=args.config, show_header=False)
    for rows in (_shape_rows(experiment), _parameter_rows(experiment, counts),
                 _training_rows(experiment, counts, args.compiled)):
        table.add_section()
        for row in rows:
            table.add_row(*row)
    output.console().print(table)


def count(experiment: Experiment, pod: str | None = None) -> dict:
    """The figures that --json prints: parameters, FLOPs per token, tensors and tokens per step.

    Args:
      pod: CHIP:SHAPE. If given, a training step is compiled for it and its FLOPs are counted, too.
    """
    from mmx.analysis import counts as counting
    from mmx.checkpoints.hf_layout import tensor_count
    from mmx.layers.kinds import kind_of

    m, t = experiment.model, experiment.train
    params = counting.count_params(m)
    counts = {
        "params_total": params.total, "params_active": params.active, "params_active_all": params.active_all,
        "params_vision": params.vision,
        "flops_per_token": counting.flops_training(m, t.length), "flops_per_token_forward": counting.flops_forward(m, t.length),
        "flops_per_token_forward_context": counting.flops_forward(m, m.context),
        "flops_per_token_companion": counting.flops_companion(m, t.length),
        "checkpoint_tensors": tensor_count(m) if all(kind_of(letter).released for letter in m.pattern) else None,
        "tokens_per_step": [[begin, batches * t.batch * t.length] for begin, batches in t.ramp or ((0, 1),)]}
    if pod:
        from mmx.compilers import aot

        counts["flops_per_token_compiled"] = aot.flops_per_token(experiment, pod)
    return counts


def _shape_rows(experiment: Experiment) -> list[tuple[str, str]]:
    m, v = experiment.model, experiment.model.vision
    alphas = {"L": m.alpha_lightning, "S": m.alpha_softmax, "MoE": m.alpha_moe}
    rows = [
        ("layers", f"{m.layers} = {m.groups} x {m.pattern}"),
        ("hidden, vocabulary", f"{m.dim:,}, {m.vocab:,}"),
        ("heads", f"{m.heads} x {m.head_dim}, {m.kv_heads} KV head{'s' * (m.kv_heads > 1)} in softmax"),
        ("RoPE", f"{m.rotary_dim} dims of a head, base {m.rope_theta:,.0f}"),
        ("experts", f"{m.experts} x {m.expert_dim:,}, top-{m.top_k}, "
                    + (f"capacity {m.capacity}" if m.capacity else "no dropping")),
        ("residual alpha", " ".join(f"{name} {alpha:.6g}" for name, alpha in alphas.items()))]
    if v.layers:
        rows.append(("vision", f"{v.layers} layers of {v.dim:,}, {v.heads} heads; "
                               f"tiles of {v.tile}, {v.patches_per_side} x {v.patches_per_side} patches"))
    return rows


def _parameter_rows(experiment: Experiment, counts: dict) -> list[tuple[str, str]]:
    rows = [("parameters", _with_unit(counts["params_total"]))]
    if experiment.model.vision.layers:
        rows.append(("vision parameters", _with_unit(counts["params_vision"])))
    return [*rows,
            ("active, without embedding and head", _with_unit(counts["params_active"])),
            ("active, with embedding and head", _with_unit(counts["params_active_all"])),
            ("checkpoint tensors", f"{counts['checkpoint_tensors']:,}" if counts["checkpoint_tensors"] else "no released form")]


def _training_rows(experiment: Experiment, counts: dict, pod: str | None) -> list[tuple[str, str]]:
    m, t = experiment.model, experiment.train
    flops = [("training", counts["flops_per_token"], t.length),
             ("training, counted as in arXiv 2406.16690", counts["flops_per_token_companion"], t.length),
             ("forward", counts["flops_per_token_forward"], t.length),
             ("forward", counts["flops_per_token_forward_context"], m.context)]
    if pod:
        flops.append((f"training, compiled for {pod}", counts["flops_per_token_compiled"], t.length))
    return [*((f"FLOPs per token, {name}", f"{value:.4g} at {length:,} tokens") for name, value, length in flops
              if value is not None),
            *(("tokens per step", f"{size:,}" + (f" from {begin:,} tokens" if begin else ""))
              for begin, size in counts["tokens_per_step"]),
            ("micro-batch", f"{t.batch:,} x {t.length:,} tokens"),
            ("mesh", ", ".join(f"{axis} {size}" for axis, size in vars(experiment.mesh).items()))]


def _with_unit(number: int) -> str:
    """The number in full, and rounded with its unit: "2,034,567  (2.0346 M)"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number:,}  ({number / size:.4f} {unit})"
    return str(number)
