"""`mmx fit`: known laws are recovered, intervals contain the true values, and mistakes in a file give one-line errors."""
import json
import math

import numpy as np
import pytest

from mmx import cli
from mmx.analysis import power_sums
from mmx.analysis.runs import COLUMNS, Runs, read_runs
from mmx.analysis.scaling import HUBER, envelope, fit
from mmx.config import ConfigError

RNG = np.random.default_rng(0)
N_I, D_I = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e10, 8), np.geomspace(1e9, 1e12, 8)))
TINY_N_I, TINY_D_I = N_I / 400, D_I / 1000       # 25 k to 25 M parameters


def runs(N_I, D_I, loss_I, noise=0.0, seed=1):
    loss_I = loss_I * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss_I)))
    return Runs("", N_I, D_I, 6 * N_I * D_I, loss_I)


def chinchilla(N_I, D_I, E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28, **noise):
    return runs(N_I, D_I, E + A / N_I ** alpha + B / D_I ** beta, **noise)


@pytest.mark.case(18)
@pytest.mark.parametrize("values, kept", [(("False",) * 4, 4), (("false", "0", "", "no"), 4), (("True", "1", "yes", "no"), 1),
                                          (("step 3 has loss nan", "None", "nan", "0.0"), 3)])
def test_truth_values_of_a_csv_file(values, kept, tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("flops,loss,diverged\n" + "".join(f"1e{15 + n},{4 - n / 2},{value}\n" for n, value in enumerate(values)))
    (read,), _ = read_runs(str(path), "power", dict.fromkeys(COLUMNS), [])
    assert len(read.loss) == kept and read.loss[-1] == 4 - 3 / 2


def test_diverged_runs_are_left_out_with_a_note(tmp_path):
    path, columns = tmp_path / "runs.jsonl", dict.fromkeys(COLUMNS)
    finished, diverged = ({"params": 1e6, "tokens": 1e7, "flops": 6e13} | end for end in
                          ({"loss": 2.0, "diverged": ""}, {"loss": None, "diverged": "step 3 has loss nan"}))
    path.write_text("\n".join(map(json.dumps, (finished, diverged, finished))))
    [read], notes = read_runs(str(path), "power", columns, [])
    assert read.loss.tolist() == [2.0, 2.0] and "diverged runs left out: 1" in notes
    path.write_text(json.dumps(diverged))
    with pytest.raises(ConfigError, match="every run in .*runs.jsonl diverged: a fit needs runs that finished"):
        read_runs(str(path), "power", columns, [])


def values(one):
    return {name: q.value for name, q in one.quantities.items()}


@pytest.mark.parametrize("law, planted, given, irreducible, tolerance", [
    ("power", {"a": 30.0, "b": 0.05}, runs(N_I, D_I, 30 * (6 * N_I * D_I) ** -0.05), False, 1e-9),
    ("power", {"E": 1.7, "a": 2e3, "b": 0.16}, runs(N_I, D_I, 1.7 + 2e3 * (6 * N_I * D_I) ** -0.16), True, 1e-5),
    ("chinchilla", {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "N_opt exponent": 28 / 62,
                    "D_opt exponent": 34 / 62}, chinchilla(N_I, D_I), False, 1e-5),
    ("chinchilla", {"E": 1.2, "A": 8.0, "B": 40.0, "alpha": 0.25, "beta": 0.28},
     chinchilla(TINY_N_I, TINY_D_I, 1.2, 8.0, 40.0, 0.25, 0.28), False, 1e-4),
    ("moe", {"d": 1.5, "a": 900.0, "b": 2e3, "c": 60.0, "alpha": -0.4, "beta": -0.35, "gamma": -0.12},
     runs(N_I, D_I, 1.5 + 900 * N_I ** -0.4 + 2e3 * D_I ** -0.35 + 60 * (N_I * D_I) ** -0.12), False, 1e-2)])
def test_recovers_known_laws(law, planted, given, irreducible, tolerance):
    found = values(fit(given, law, irreducible, resamples=40))
    assert {name: found[name] for name in planted} == pytest.approx(planted, rel=tolerance)


def test_optimum_minimises_the_fitted_law():
    found = values(fit(chinchilla(N_I, D_I), "chinchilla", resamples=40))
    C = 1e21
    sizes = np.geomspace(1e8, 1e11, 100_001)
    best = sizes[np.argmin(chinchilla(sizes, C / (6 * sizes)).loss)]
    N, D = (found[f"{name} coefficient"] * C ** found[f"{name} exponent"] for name in ("N_opt", "D_opt"))
    assert N == pytest.approx(best, rel=1e-3) and 6 * N * D == pytest.approx(C, rel=1e-9)


def test_envelope_leaves_out_runs_that_a_cheaper_run_beats():
    C_I = np.array([1.0, 1.05, 10, 10.5, 30, 100, 105])
    loss_I = np.array([5.0, 4.9, 4.0, 4.2, 4.1, 3.5, 3.0])
    assert envelope(C_I, loss_I, 0.2).tolist() == [False, True, True, False, False, False, True]
    C = np.repeat(np.geomspace(1e17, 1e21, 9), 3)
    found = fit(Runs("", None, None, C, 30 * C ** -0.05 * np.tile([1.1, 1, 1.3], 9)), "envelope", resamples=40)
    assert found.used_I.sum() == 9 and values(found) == pytest.approx({"a": 30, "b": 0.05}, rel=1e-9)


def test_isoflop_recovers_exact_minima_and_their_line():
    """Losses are exact parabolas in log N; FLOPs vary by 5 % within a budget; a budget with one size is left out."""
    budgets, sizes = np.array([1e18, 1e19, 1e20, 1e21]), np.linspace(-1.5, 1, 6)
    C_I = np.repeat(budgets, 6) * (1 + 0.05 * RNG.random(24))
    centre_I = np.repeat(0.09 * budgets ** 0.5, 6)
    N = centre_I * np.exp(np.tile(sizes, 4))
    loss = np.repeat([3.0, 2.7, 2.5, 2.4], 6) + 0.02 * np.tile(sizes, 4) ** 2
    one = fit(Runs("", np.r_[N, 1e6], np.r_[C_I / (6 * N), 1e6], np.r_[C_I, 1e25], np.r_[loss, 9]), "isoflop", resamples=40)
    found = values(one)
    assert found["N_opt exponent"] == pytest.approx(0.5, abs=0.01) and found["D_opt exponent"] == pytest.approx(0.5, abs=0.01)
    assert [row["N_opt"] for row in one.minima] == pytest.approx(0.09 * budgets ** 0.5, rel=1e-9)
    assert [row["loss"] for row in one.minima] == pytest.approx([3.0, 2.7, 2.5, 2.4], rel=1e-9)
    assert one.notes == ["left out 1 of 5 budgets, which have fewer than 4 sizes"] and not one.used_I[-1]


def test_intervals_contain_the_true_value():
    """At least 88 of 100 fits of the law power to 12 runs; experiments/measure/fit_coverage.py counts all laws."""
    C_I, count = np.geomspace(1e17, 1e21, 12), 0
    for seed in range(100):
        noise_I = np.exp(0.005 * np.random.default_rng(seed).standard_normal(12))
        b = fit(Runs("", None, None, C_I, 30 * C_I ** -0.05 * noise_I), "power", resamples=100, seed=seed).quantities["b"]
        count += b.low <= 0.05 <= b.high and b.high - b.low < 0.01
    assert count >= 88


def test_resamples_reach_the_minimum_of_a_full_search():
    given = chinchilla(N_I, D_I, noise=0.01)
    x_KI, y_I = np.log([N_I, D_I]), np.log(given.loss)
    x_KI = x_KI - x_KI.mean(1, keepdims=True)
    bounds = power_sums.search_bounds(y_I, 2, True)
    theta_J = power_sums.solve(x_KI, y_I, True, HUBER, bounds)[0]
    for seed in range(3):
        drawn_I = np.random.default_rng(seed).integers(0, len(y_I), len(y_I))
        weight_I = np.bincount(drawn_I, minlength=len(y_I)).astype(float)
        warm_J = power_sums.descend(theta_J[None], x_KI, weight_I[None], y_I, HUBER, bounds)[0][0]
        cold_J = power_sums.solve(x_KI[:, drawn_I], y_I[drawn_I], True, HUBER, bounds)[0]
        np.testing.assert_allclose(warm_J, cold_J, atol=1e-4)


def test_gradient_matches_finite_differences():
    theta_J, x_KI = np.array([0.3, -0.2, 0.5, 0.4, 0.2]), RNG.standard_normal((2, 7))
    gradient_JI = power_sums.gradient(power_sums.log_sum(theta_J[None], x_KI)[1], x_KI)[0]
    for j, step_J in enumerate(1e-6 * np.eye(5)):
        up_I, down_I = (power_sums.log_sum((theta_J + sign * step_J)[None], x_KI)[0][0] for sign in (1, -1))
        np.testing.assert_allclose(gradient_JI[j], (up_I - down_I) / 2e-6, atol=1e-8)


def test_notes_on_values_that_the_runs_do_not_determine():
    flat = Runs("", None, None, np.geomspace(1e17, 1e21, 10), 3 * np.exp(0.01 * np.random.default_rng(2).standard_normal(10)))
    assert fit(flat, "power").quantities["b"].note == "the interval contains 0"
    C_I = np.geomspace(1e17, 1e21, 10)
    assert "bound" in fit(Runs("", None, None, C_I, 30 * C_I ** -0.05), "power", True, resamples=40).quantities["E"].note


def test_intervals_beyond_the_range_of_floats():
    """Constant losses: the optima of the resamples reach from 0 to infinity."""
    N_I, D_I = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e10, 4), np.geomspace(1e9, 1e12, 4)))
    for seed in range(1, 5):
        for name, q in fit(runs(N_I, D_I, np.full(16, 3.0), 1e-4, seed), "chinchilla", resamples=60).quantities.items():
            assert math.isnan(q.low) or q.low <= q.value <= q.high, name


def test_isoflop_without_minima_explains_why():
    N = np.tile(np.geomspace(1e7, 1e8, 5), 3)
    C = np.repeat([1e18, 1e19, 1e20], 5)
    one = fit(Runs("", N, C / (6 * N), C, 3 - 0.1 * np.log(N / 1e7) ** 2), "isoflop", resamples=40)
    assert {q.note for q in one.quantities.values()} == {"no line: fewer than 2 budgets have a minimum"}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A CSV with other column names: two architectures, FLOPs, no tokens."""
    path = tmp_path_factory.mktemp("fit") / "runs.csv"
    given = chinchilla(N_I, D_I, noise=0.005)
    lines = [f"{kind},{N!r},{C!r},{L!r}" for kind in ("soft, max", "hybrid") for N, C, L in zip(
        given.params.tolist(), given.flops.tolist(), given.loss.tolist())]
    path.write_text("\n".join(["Kind,Model Size,Training FLOP,loss", *(
        line.replace("soft, max", '"soft, max"') for line in lines)]) + "\n")
    return path


def command(table, law="chinchilla", *more):
    return ["fit", str(table), "--law", law, "--params", "Model Size", "--flops", "Training FLOP", "--bootstrap", "40", *more]


def test_command_prints_json_tables_and_a_plot(table, tmp_path, capsys):
    out = tmp_path / "new"
    assert cli.main(command(table, "chinchilla", "--by", "Kind", "--out", str(out), "--json")) == 0
    first = capsys.readouterr().out
    found = json.loads(first)
    assert [(one["runs"], one["points"]) for one in found["fits"]] == [("Kind soft, max", 64), ("Kind hybrid", 64)]
    assert found["notes"] == [f"{table} has no column of tokens: computed as FLOPs / (6 * params)"]
    alpha = found["fits"][0]["parameters"]["alpha"]
    assert alpha["low"] < 0.34 < alpha["high"] and found["fits"][1]["parameters"]["alpha"] == alpha
    assert (out / "fit.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(command(table, "chinchilla", "--by", "Kind", "--out", str(out), "--json")) == 0
    assert capsys.readouterr().out == first
    for law in ("power", "envelope", "isoflop"):
        assert cli.main(command(table, law, "--out", str(out))) == 0
        assert "95 % interval" in capsys.readouterr().out


def test_flops_are_computed_from_params_and_tokens(tmp_path):
    path, given = tmp_path / "runs.jsonl", chinchilla(N_I, D_I)
    rows = [{"arch": "LLS", "params": N, "tokens": D, "loss": L, "more": [1]} for N, D, L in zip(N_I, D_I, given.loss)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets, notes = read_runs(str(path), "power", dict.fromkeys(COLUMNS), [])
    assert notes == [f"{path} has no column of FLOPs: computed as 6 * params * tokens"] and sets[0].label == "arch LLS"
    np.testing.assert_allclose(sets[0].flops, given.flops)


@pytest.mark.parametrize("text, law, flags, message", [
    ("params,tokens,lss\n1,2,3\n", "chinchilla", [],
     "has no column 'loss': name it by --loss COL; did you mean lss? known: params, tokens, lss"),
    ("params,loss\n1,2\n", "chinchilla", [], "--law chinchilla needs params, tokens, loss, and"),
    ("Model Size,loss\n1,2\n", "power", ["--flops", "Model"], "has no column 'Model' (--flops); did you mean Model Size?"),
    ("flops,loss\n1,2\n", "power", ["--by", "kind"], "has no column 'kind' (--by)"),
    ("flops,loss\n1e18,3\n1e19,nan\n", "power", [], "runs:3: loss is 'nan', and must be a positive number"),
    ("flops,loss\n1e18,3\n-1,3\n", "power", [], "runs:3: flops is '-1', and must be a positive number"),
    ("flops,loss\n1e18,3\n1e19,\n", "power", [], "runs:3: loss is '', and must be a positive number"),
    ("flops,loss\n1e18,3\n1e19\n", "power", [], "runs:3: fewer values than the header's 2 columns"),
    ("flops,loss\n1e18,3,4\n", "power", [], "runs:2: more values than the header's 2 columns"),
    ('{"flops": 1e18, "loss": 3}\n{"flops": 1', "power", [], "runs:2: not a JSON object"),
    ('{"flops": 1e18, "loss": 3}\n{"flops": 1e19, "loss": Infinity}', "power", [], "runs:2: loss is inf, and must be"),
    ('{"flops": 1e18, "loss": 3}\n{"flops": 1e19}', "power", [], "runs:2: loss is None, and must be"),
    ("", "power", [], "has no rows"), ("flops,loss\n", "power", [], "has no rows"),
    (b"\x89PNG\r\n\xff\x00", "power", [], "is neither CSV nor JSON lines: not UTF-8 at byte 0"),
    ("flops,loss\n1e18,3\n1e19,2.9\n1e20,2.8\n", "power", [], "too few runs for --law power, which fits 2 "
     "parameters: it needs 4 runs with 2 distinct values of FLOPs; given: 3 runs, distinct values: 3"),
    ("params,tokens,loss\n" + "1e6,1e9,3\n" * 9, "chinchilla", [], "which fits 5 parameters: it needs 7 runs with 3 "
     "distinct values of params and of tokens; given: 9 runs, distinct values: 1"),
    ("params,flops,loss\n" + "1e6,1e18,3\n2e6,1e18,3\n" * 9, "isoflop", [], "0 of 1 compute budgets have 4 sizes or more"),
    ("flops,loss\n1,2\n", "power", ["--bootstrap", "2"], "--bootstrap 2 is out of range: it must be 40 or more"),
    ("flops,loss\n1,2\n", "power", ["--seed", "-1"], "--seed -1 is out of range: it must be 0 or more"),
    ("params,tokens,loss\n1,2,3\n", "chinchilla", ["--irreducible"],
     "--irreducible works with --law power and --law envelope, not"),
])
def test_mistakes_give_one_line_errors(text, law, flags, message, tmp_path, capsys):
    path = tmp_path / "runs"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["fit", str(path), "--law", law, "--out", str(tmp_path / "new"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and err.startswith("mmx: ")
    assert not (tmp_path / "new").exists()


def test_missing_file(tmp_path, capsys):
    assert cli.main(["fit", str(tmp_path / "no.csv"), "--law", "power"]) == 2
    assert capsys.readouterr().err == f"mmx: {tmp_path / 'no.csv'} is missing\n"
