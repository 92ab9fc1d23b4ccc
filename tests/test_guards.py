"""Guards: what is counted, when a run goes back, and when it ends."""
import math

import pytest

from mmx import config
from mmx.training.guards import DivergedError, Guard


def guard(**options):
    return Guard(config.build({"guard": options}))


def test_steps_that_are_no_number_are_counted_until_too_many_in_a_row():
    g = guard(skips=2)
    for step, (loss, norm) in enumerate([(math.nan, 1), (1, math.inf), (1, 1), (math.inf, 1), (-math.inf, math.nan)], 1):
        assert g.see(step, loss, norm) == ""
    assert (g.skipped, g.row) == (4, 2)
    with pytest.raises(DivergedError, match="^step 6 has loss nan, gradient norm 1, as the 2 steps before it: lower train.lr="):
        g.see(6, math.nan, 1)
    assert DivergedError.code == 4


def test_a_spike_is_measured_from_the_median_of_a_full_window():
    g = guard(spike=1.0, window=3)
    assert [g.see(step, loss, 1) for step, loss in enumerate((2, 9, 2.1), 1)] == [""] * 3     # not full yet: nothing is usual
    assert g.see(4, 3.05, 1) == "" and g.losses == [9, 2.1, 3.05]
    assert g.see(5, 4.1, 1) == "step 5 has loss 4.100, usual is 3.050" and g.losses == [9, 2.1, 3.05]
    assert guard().see(1, 1e9, 1) == ""


def test_rollbacks_from_one_checkpoint_are_bounded():
    g = guard(spike=1.0, window=1, rollbacks=2)
    g.see(1, 2, 1)
    kept = g.state()
    for count in (1, 2):
        assert g.see(2, 4, 1)
        g.went_back(kept)
        assert g.rollbacks == count and g.losses == [2]
    with pytest.raises(DivergedError, match="^step 2 has loss 4.000, usual is 2.000, and 2 rollbacks did not help: lower"):
        g.see(2, 4, 1)
    g.saved()
    assert g.see(3, 4, 1)
    g.went_back(g.state())
    assert g.rollbacks == 3


def test_a_restored_guard_goes_on():
    g, other = guard(spike=1.0, window=3), guard(spike=1.0, window=3)
    for step, loss in enumerate((3, math.nan, 2, 2), 1):
        g.see(step, loss, 1)
    other.restore(g.state())
    assert other.state() == g.state() == {"skipped": 1, "rollbacks": 0, "row": 0, "losses": [3, 2, 2]}
    assert other.see(5, 3.5, 1) == g.see(5, 3.5, 1) != ""


@pytest.mark.parametrize("name, value", [("skips", -1), ("spike", -0.5), ("window", 0), ("beyond", -1), ("rollbacks", 0)])
def test_settings_have_bounds(name, value):
    with pytest.raises(config.ConfigError, match=rf"guard.{name}={value} must be \d or more"):
        guard(**{name: value})
