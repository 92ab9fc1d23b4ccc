"""The runner: files after a kill, resuming, tables and figures, and errors."""
import json
import re
import resource

import numpy as np
import pytest

from mmx.config import ConfigError
from mmx.data import tokens
from mmx.evals import examples, runner
from mmx.evals.examples import Example, PlannedExample, SuiteOptions
from mmx.evals.runner import ModelInterface
from mmx.evals.suites import SUITES

BYTES = tokens.tokenizer("bytes")
OPTIONS = SuiteOptions(BYTES, lengths=(300, 600), rows=("0", "100"), examples=3)


class Counted:
    """A model that answers shallow needles. Counts its calls; after `last` of them it raises KeyboardInterrupt."""

    def __init__(self, last: int = 10**9):
        self.calls, self.last = 0, last

    def __call__(self, prompt, steps, stop):
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        found = re.search(r"number is: (\d+)\.", prompt)
        return found[1] if found.start() < 100 else "none"


def run(out, model, options=OPTIONS, step=1):
    return runner.run("needle", options, ModelInterface(model, None), out, {"step": step})


def figures(result):
    return {k: v for k, v in result.items() if k != "seconds"}


def test_the_table_agrees_with_the_lines(tmp_path):
    result = run(tmp_path, Counted())
    lines = [json.loads(line) for line in (tmp_path / "needle.jsonl").read_text().splitlines()]
    assert lines[0] == {"suite": "needle", "step": 1, "seed": 0, "context": 0, "data": None} and len(lines) == 13
    assert result["scores"] == {"0": {"300": 1.0, "600": 1.0}, "100": {"300": 0.0, "600": 0.0}}
    assert result["by_column"] == {"300": 0.5, "600": 0.5} and result["score"] == 0.5
    assert result["examples"] == 12 and result["tokens"] == sum(line["tokens"] for line in lines[1:])
    assert json.loads((tmp_path / "needle.json").read_text()) == result
    assert all(1 + len(line["answers"][0]) == 8 and line["output"] in ("none", *line["answers"]) for line in lines[1:])


@pytest.mark.parametrize("last", [0, 1, 7, 11])
def test_a_killed_run_resumes(last, tmp_path):
    whole = run(tmp_path / "whole", Counted())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", Counted(last))
    path = tmp_path / "killed" / "needle.jsonl"
    assert len(path.read_text().splitlines()) == 1 + last
    with path.open("a") as file:
        file.write('{"row": "0", "column": "3')         # the incomplete last line
    rest = Counted()
    assert figures(run(tmp_path / "killed", rest)) == figures(whole) and rest.calls == 12 - last
    assert len(path.read_text().splitlines()) == 13
    again = Counted()
    assert run(tmp_path / "killed", again)["score"] == whole["score"] and again.calls == 0
    more = Counted()
    assert run(tmp_path / "killed", more, OPTIONS._replace(lengths=(300, 900), examples=4))["examples"] == 16
    assert more.calls == 2 + 8      # two more of the old length, all four of the new one


def test_an_incomplete_header_is_rewritten(tmp_path):
    (tmp_path / "needle.jsonl").write_text('{"suite": "nee')
    assert run(tmp_path, Counted())["examples"] == 12
    (tmp_path / "needle.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match="needle.jsonl does not contain examples of a suite"):
        run(tmp_path, Counted())
    assert (tmp_path / "needle.jsonl").read_text() == "mine\n"


def test_results_of_another_run_are_refused(tmp_path):
    run(tmp_path, Counted(), OPTIONS._replace(examples=1))
    before = (tmp_path / "needle.jsonl").read_bytes()
    for options, step, message in ((OPTIONS._replace(seed=1), 1, r"seed \(was 0, now 1\)"),
                                   (OPTIONS, 2, r"step \(was 1, now 2\)"),
                                   (OPTIONS._replace(context=900), 1, r"context \(was 0, now 900\)")):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, Counted(), options, step)
    assert (tmp_path / "needle.jsonl").read_bytes() == before


def test_a_full_disk_is_reported_and_the_run_resumes(tmp_path):
    """Files are limited to 1,000 bytes: the write that exceeds this is incomplete, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as error:
            run(tmp_path, Counted())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / "needle.jsonl") and (tmp_path / "needle.jsonl").stat().st_size == 1000
    rest = Counted()
    assert figures(run(tmp_path, rest)) == figures(run(tmp_path / "whole", Counted())) and 0 < rest.calls < 12


def test_prompts_longer_than_the_context_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"prompts of 600 tokens are longer than --context 599"):
        run(tmp_path / "out", Counted(), OPTIONS._replace(context=599))
    assert not (tmp_path / "out").exists()
    plan = lambda options: [PlannedExample("a", "full", 0, lambda: Example("x" * 50, ("y",)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SUITES, "needle", SUITES["needle"]._replace(plan=plan))
        with pytest.raises(ConfigError, match="full a, example 0: a prompt of 51 tokens is longer than --context 50"):
            run(tmp_path, Counted(), OPTIONS._replace(context=50, lengths=()))


def test_ids_are_scored_by_row(tmp_path):
    score = lambda ids_T, next_T: (np.where(np.arange(len(ids_T)) < 64, np.log(2.0), np.log(8.0)), next_T)
    model = ModelInterface(None, score)
    result = runner.run("position", SuiteOptions(BYTES, lengths=(256,), examples=2), model, tmp_path, {})
    by_row = {row: cells["256"] for row, cells in result["scores"].items()}
    assert by_row == pytest.approx({"0-63": 2, "64-127": 8, "128-255": 8})
    assert result["score"] == result["by_column"]["256"] == pytest.approx(2 ** ((64 + 3 * 192) / 256))
    result = runner.run("mqar", SuiteOptions(BYTES, lengths=(65,), rows=("16",), examples=2), model, tmp_path, {})
    assert result["score"] == 1


@pytest.mark.parametrize("name, lengths", [("needle", (300, 600)), ("position", (256, 1024))])
def test_tables_and_figures(name, lengths, tmp_path):
    model = ModelInterface(Counted(), lambda ids_T, next_T: (np.ones(len(ids_T)), next_T))
    result = runner.run(name, SuiteOptions(BYTES, lengths=lengths, examples=1), model, tmp_path, {})
    result["seen"] = [str(lengths[1])]
    assert runner.plot(result, tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    table = runner.make_table(result)
    heads = [column.header for column in table.columns[1:]]
    assert heads == [examples.format_length(str(lengths[0])), examples.format_length(str(lengths[1])) + "*"]
    assert table.row_count == len(result["scores"]) + 1 and "training split" in table.caption
