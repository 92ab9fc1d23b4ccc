"""`mmx fit`: fits a scaling law to a file of runs, and reports it as JSON, as tables and as a plot."""
import math
from pathlib import Path

import numpy as np
from rich.table import Table

from mmx.analysis.runs import read_runs
from mmx.analysis.scaling import FORMULAS, Fit, budgets, fit
from mmx.config import ConfigError
from mmx.files import output

MIN_RESAMPLES = 40      # fewer leave the 2.5 % percentile to a single resample


def run(path: str, law: str, columns: dict[str, str | None], by: list[str], irreducible: bool = False, tolerance: float = 0.2,
        resamples: int = 1000, seed: int = 0) -> tuple[dict, list[Fit]]:
    """Fits `law` to each group of runs in a file.

    Args:
      path, columns, by: as in `runs.read_runs`.
      law, irreducible, tolerance, resamples, seed: as in `scaling.fit`.
    Returns:
      The report that `show` prints, and the fits that `plot` draws.
    Raises:
      ConfigError: an argument is out of range, or the file does not have what the law needs.
    """
    if irreducible and law not in ("power", "envelope"):
        raise ConfigError(f"--irreducible works with --law power and --law envelope, not with --law {law}")
    for flag, value, wrong, least in (("tolerance", tolerance, not 0 <= tolerance < math.inf, 0), ("seed", seed, seed < 0, 0),
                                      ("bootstrap", resamples, resamples < MIN_RESAMPLES, MIN_RESAMPLES)):
        if wrong:
            raise ConfigError(f"--{flag} {value} is out of range: it must be {least} or more")
    groups, notes = read_runs(path, law, columns, by)
    fits = [fit(runs, law, irreducible, tolerance, resamples, seed) for runs in groups]
    formula = FORMULAS[law].replace("= a", "= E + a") if irreducible else FORMULAS[law]
    return {"law": law, "formula": formula, "bootstrap": resamples, "seed": seed, "interval": 0.95, "notes": notes,
            "fits": list(map(_summarize, fits))}, fits


def _summarize(one: Fit) -> dict:
    """The figures of a fit for JSON: null for a number that is not finite."""
    finite = lambda value: value if math.isfinite(value) else None
    parameters = {name: {"value": finite(q.value), "low": finite(q.low), "high": finite(q.high), "note": q.note}
                  for name, q in one.quantities.items()}
    minima = {"minima": [{key: finite(value) for key, value in row.items()} for row in one.minima]} if one.minima else {}
    return {"runs": one.runs.label, "points": int(one.used_I.sum()), "of": len(one.runs.loss),
            "rms_log_residual": finite(float(np.sqrt(np.mean(_residuals(one) ** 2)))), "parameters": parameters,
            "notes": one.notes, **minima}


def _residuals(one: Fit) -> np.ndarray:
    return np.log(one.runs.loss[one.used_I] / one.fitted_I)


def show(report: dict):
    """Prints the tables and notes of a report."""
    number = lambda value: "-" if value is None else f"{value:.5g}"
    table = Table("runs", "quantity", "value", "95 % interval", "note", title=report["formula"])
    for one in report["fits"]:
        label = f"{one['runs'] or 'all'}: {one['points']}" + f" of {one['of']}" * (one["points"] < one["of"])
        for name, q in one["parameters"].items():
            table.add_row(label, name, number(q["value"]), "-" if q["low"] is None else f"{q['low']:.4g} to {q['high']:.4g}"
                          if q["high"] is not None else f"above {q['low']:.4g}", q["note"])
            label = ""      # only on the first line
        rms = one["rms_log_residual"]
        table.add_row("", "RMS of log residuals", "-" if rms is None else f"{rms:.2g}", end_section=True)
    output.console().print(table)
    for one in report["fits"]:
        if "minima" in one:
            table = Table("FLOPs", "sizes", "N_opt", "D_opt", "loss", title=f"Minima of the parabolas {one['runs']}".strip())
            for row in one["minima"]:
                table.add_row(*(number(row[key]) for key in ("flops", "sizes", "N_opt", "D_opt", "loss")))
            output.console().print(table)
    for note in [*report["notes"], *(f"{one['runs'] + ': ' if one['runs'] else ''}{note}" for one in report["fits"]
                                     for note in one["notes"])]:
        print(note)


def plot(fits: list[Fit], law: str, formula: str, path: Path) -> Path:
    """Writes a figure of the fits and their residuals to `path`, and returns the path."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for number, one in enumerate(fits):
        colour, runs, used_I = f"C{number % 10}", one.runs, one.used_I
        x_I = runs.params if law == "isoflop" else runs.flops
        left.plot(x_I[~used_I], runs.loss[~used_I], ".", color=colour, alpha=0.25)
        left.plot(x_I[used_I], runs.loss[used_I], ".", color=colour, label=runs.label.replace("$", r"\$") or None)
        if law == "isoflop":
            left.plot([row["N_opt"] for row in one.minima], [row["loss"] for row in one.minima], "k*")
        for group in _curves(one, law):
            left.plot(x_I[used_I][group], one.fitted_I[group], color=colour, linewidth=0.8)
        right.plot(x_I[used_I], 100 * _residuals(one), ".", color=colour)
    right.axhline(0, color="grey", linestyle=":")
    x = "parameters" if law == "isoflop" else "training compute (FLOPs)"
    left.set(xscale="log", yscale="log", xlabel=x, ylabel="loss", title=formula)
    for set_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        set_formatter(ticker.StrMethodFormatter("{x:g}"))
    right.set(xscale="log", xlabel=x, ylabel="log(loss / fitted loss), %", title="Residuals")
    for axes in (left, right):
        axes.xaxis.set_minor_formatter(ticker.FuncFormatter(_minor_label if _decades(axes.get_xlim()) < 2.5 else lambda *_: ""))
    if any(one.runs.label for one in fits):
        left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _decades(limits) -> float:
    return math.log10(limits[1] / limits[0])


def _minor_label(x, _) -> str:
    """Labels only 2 and 5 times a power of ten, so that labels do not overlap."""
    exponent = math.floor(math.log10(x))
    digit = round(x / 10 ** exponent)
    return rf"${digit}\times10^{{{exponent}}}$" if digit in (2, 5) else ""


def _curves(one: Fit, law) -> list[np.ndarray]:
    """The fitted runs that each curve of the plot joins: one curve for all, for each budget, or for each model size."""
    params_I, flops_I = (None if column is None else column[one.used_I] for column in (one.runs.params, one.runs.flops))
    if law == "isoflop":
        return [group[np.argsort(params_I[group])] for group in budgets(flops_I, one.tolerance)]
    sizes_I = np.zeros(len(flops_I)) if law in ("power", "envelope") else params_I
    groups = [np.flatnonzero(sizes_I == size) for size in set(sizes_I)]
    return [group[np.argsort(flops_I[group])] for group in groups]
