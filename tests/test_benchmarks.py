"""The processes of the benchmarks."""
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from child import started


def cases(path):
    """In the child: reports SIGTERM in a file, as libtpu reports it in a stack trace."""
    signal.signal(signal.SIGTERM, lambda *_: Path(path, "terminated").touch())
    return {"pid": os.getpid, "fail": lambda: 1 / 0}


@pytest.mark.case(30)
def test_children_end_by_themselves(tmp_path):
    with started(cases, str(tmp_path)) as run:
        child = run("pid")
        assert child != os.getpid() and run("pid") == child
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert not list(tmp_path.iterdir())
