"""Names of folders with characters that have a meaning for submitit, SLURM or rich."""
import functools
import io

import pytest
from rich.table import Table

from mmx.config import ConfigError
from mmx.files import output
from mmx.launch.sweep import ExecutorOptions, executors


@pytest.mark.case(26)
def test_characters_with_a_meaning_in_a_path(tmp_path):
    """submitit replaces %j by the number of the job; [x] and :x: are markup of rich."""
    out = tmp_path / "s 50%j = %A [x] \\ :x:"
    executor = executors.make(ExecutorOptions("local"), out)
    outcome, = executors.run_copies(executor, 1, functools.partial(executors.Outcome, "done"), 7)
    assert outcome == ("done", 7) and [path.name for path in tmp_path.iterdir()] == [out.name]
    assert {path.name.partition("_")[2] for path in out.glob("jobs/*/*")} >= {"0_log.out", "0_result.pkl"}
    with pytest.raises(ConfigError, match=r"contains % or \\, which have a meaning for sbatch"):
        executors._alias(str(out), "slurm")
    with io.StringIO() as text:
        console = output.console(file=text, width=200)
        table = Table()
        table.add_row(str(out))
        console.print(table)
        assert str(out) in text.getvalue()
