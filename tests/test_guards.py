"""Guards: what they count, when they roll a run back, and when they end it."""
import math

import pytest

from mmx import config
from mmx.training.guards import DivergedError, Guard, Rollback


def guard(**options):
    return Guard(config.build({"guard": options}))


class Stream:
    """A data stream that counts the batches read and keeps what `Guard.roll_back` passes."""

    def __init__(self):
        self.read, self.rewound_to = 0, None

    def state(self):
        return {"read": self.read}

    def restore(self, state):
        self.read = state["read"]

    def next(self):
        self.read += 1

    def rewind_step_count(self, state):
        self.rewound_to = state


class Restored:
    """A checkpoint whose guard had `state`."""

    def __init__(self, state):
        self.host_state = {"stream": {"read": 0}, "guard": state}


def roll_back(g, spike, state):
    g.stream_states[spike.step] = {"read": spike.step}
    return g.roll_back(spike, Stream(), lambda: Restored(state))


def test_nonfinite_steps_are_counted_until_too_many_in_a_row():
    g = guard(skips=2)
    for step, (loss, norm) in enumerate([(math.nan, 1), (1, math.inf), (1, 1), (math.inf, 1), (-math.inf, math.nan)], 1):
        assert g.check(step, loss, norm) is None
    assert (g.skipped, g.skipped_in_a_row) == (4, 2)
    with pytest.raises(DivergedError, match="^step 6 has loss nan and gradient norm 1, and the 2 steps before it were skipped "
                       "too: a resumed run would stop at the same step; start in another --workdir with a lower learning "):
        g.check(6, math.nan, 1)
    assert DivergedError.code == 4


def test_a_spike_is_measured_from_the_median_of_a_full_window():
    g = guard(spike=1.0, window=3)
    assert [g.check(step, loss, 1) for step, loss in enumerate((2, 9, 2.1), 1)] == [None] * 3     # the window was not full
    assert g.check(4, 3.05, 1) is None and g.losses == [9, 2.1, 3.05]
    assert g.check(5, 4.1, 1) == Rollback(5, "step 5 has loss 4.100, the median of the last 3 is 3.050")
    assert g.losses == [9, 2.1, 3.05]
    assert guard().check(1, 1e9, 1) is None


def test_rollbacks_from_one_checkpoint_are_bounded():
    g = guard(spike=1.0, window=1, rollbacks=2)
    g.check(1, 2, 1)
    state = g.state()
    for count in (1, 2):
        roll_back(g, g.check(2, 4, 1), state)
        assert g.rollbacks == count and g.losses == [2]
    with pytest.raises(DivergedError, match="^step 2 has loss 4.000, the median of the last 1 is 2.000, and 2 rollbacks "):
        g.check(2, 4, 1)
    g.saved()
    roll_back(g, g.check(3, 4, 1), g.state())
    assert g.rollbacks == 3


def test_a_rollback_discards_the_data_up_to_the_spike_and_beyond():
    g, stream = guard(spike=1.0, window=1, beyond=2), Stream()
    g.check(1, 2, 1)
    state = g.state()
    for step in range(1, 5):
        stream.next()
        g.record_stream(step, stream)
    restored = g.roll_back(g.check(3, 4, 1), stream, lambda: Restored(state))
    assert restored.host_state["guard"] == state and g.losses == [2]
    assert stream.read == 5 and stream.rewound_to == {"read": 0}      # three batches up to the spike, two beyond it


def test_a_restored_guard_continues_the_same():
    g, other = guard(spike=1.0, window=3), guard(spike=1.0, window=3)
    for step, loss in enumerate((3, math.nan, 2, 2), 1):
        g.check(step, loss, 1)
    other.restore(g.state())
    assert other.state() == g.state() == {"skipped": 1, "rollbacks": 0, "row": 0, "losses": [3, 2, 2]}
    assert other.check(5, 3.5, 1) == g.check(5, 3.5, 1) and other.losses == [3, 2, 2]


@pytest.mark.parametrize("name, value", [("skips", -1), ("spike", -0.5), ("window", 0), ("beyond", -1), ("rollbacks", 0)])
def test_settings_have_bounds(name, value):
    with pytest.raises(config.ConfigError, match=rf"guard.{name}={value} must be \d or more"):
        guard(**{name: value})
