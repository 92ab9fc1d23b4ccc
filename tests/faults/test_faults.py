"""A short run of some fault scenarios; `make faults` runs all of them for longer."""
import os
import random
import signal

import harness
import interrupts
import pytest
import scenarios


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    before = dict(os.environ)
    os.environ |= harness.settings(folder)
    yield harness.Workspace(folder, steps=60)
    os.environ.clear()
    os.environ |= before


@pytest.fixture
def rng():
    seed = random.randrange(10 ** 6)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.mark.case(34)
def test_a_killed_run_ends_with_the_same_bits(workspace, rng):
    """Five SIGKILLs, a SIGTERM and a SIGSTOP; the clock of some processes jumps.

    The workspace's own number of steps takes less time than the signals, as on a fast machine.
    """
    signals = [signal.SIGKILL] * 5 + [signal.SIGTERM, signal.SIGSTOP]
    rng.shuffle(signals)
    print(scenarios.kills(harness.Workspace(workspace.folder / "fast", steps=1), signals, rng))


@pytest.mark.case(28)
def test_an_interrupt_is_one_line_at_any_time(workspace, rng):
    """One interrupt during the imports, two during compilation; `make faults ONLY=interrupts` sends a hundred."""
    print(interrupts.interrupts(workspace, 3, rng))


def test_a_damaged_checkpoint_is_not_restored(workspace, rng):
    print(scenarios.damage(workspace, 200, rng))


def test_a_failed_write_is_reported(workspace):
    scenarios.short_files(workspace)


def test_a_read_only_disk_is_reported(workspace):
    scenarios.read_only(workspace)
