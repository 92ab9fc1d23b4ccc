"""The harness, as long as the suite has time for: `make faults` does more of each."""
import os
import random
import signal

import harness
import pytest
import scenarios


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    before = dict(os.environ)
    os.environ |= harness.settings(folder)
    yield harness.Place(folder, steps=60)
    os.environ.clear()
    os.environ |= before


@pytest.fixture
def rng():
    seed = random.randrange(10 ** 6)
    print(f"seed {seed}")
    return random.Random(seed)


def test_killed_anywhere_a_run_ends_with_the_same_bits(place, rng):
    """By SIGKILL five times, and by SIGTERM, and after SIGSTOP; the clock of some processes leaps."""
    signals = [signal.SIGKILL] * 5 + [signal.SIGTERM, signal.SIGSTOP]
    rng.shuffle(signals)
    print(scenarios.kills(place, signals, rng))


def test_no_damage_is_restored(place, rng):
    print(scenarios.damage(place, 200, rng))


def test_a_write_that_fails(place):
    scenarios.short_files(place)


def test_a_directory_that_cannot_be_written(place):
    scenarios.read_only(place)
