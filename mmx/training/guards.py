"""Guards against divergence: they count skipped steps and roll a run back after a loss spike.

`step.train_step` skips the update of a step whose loss or gradient norm is not finite; the guard counts these steps. A spike
is a loss more than guard.spike nats above the median of the last guard.window losses. It rolls the run back to its last
checkpoint and discards the data read since then, because the same parameters on the same data would spike again. A run that
neither skips nor rollbacks can save raises DivergedError. The guard's state is part of a checkpoint, so that a resumed run
does the same as an uninterrupted one.
"""
import math
import statistics
from typing import NamedTuple

from mmx import config
from mmx.config import ConfigError


class DivergedError(ConfigError):
    """The run cannot recover. Started again, it would end at the same step."""
    code = 4


class Spike(NamedTuple):
    """A step that rolls the run back."""
    step: int
    reason: str


class Guard:
    """Watches the losses of a run. `skipped` and `rollbacks` count the skipped steps and the rollbacks since its start."""

    def __init__(self, e: config.Experiment):
        self.config, self.train = e.guard, e.train
        self.rollbacks_since_save = 0
        self.stream_states = {}     # of the last two steps, after their batches were read
        self.restore(None)

    def state(self) -> dict:
        """What a checkpoint keeps of the guard, for JSON."""
        return self.counts() | {"row": self.skipped_in_a_row, "losses": self.losses.copy()}

    def counts(self) -> dict[str, int]:
        """What each line of metrics.jsonl reports of the guard."""
        return {"skipped": self.skipped, "rollbacks": self.rollbacks}

    def restore(self, state: dict | None) -> None:
        """Continues from a `state` of a checkpoint. None starts as in a new run."""
        state = state or {"skipped": 0, "rollbacks": 0, "row": 0, "losses": []}
        self.skipped, self.rollbacks, self.skipped_in_a_row = state["skipped"], state["rollbacks"], state["row"]
        self.losses = state["losses"].copy()        # the last guard.window losses that were no spike

    def check(self, step: int, loss: float, grad_norm: float) -> Spike | None:
        """Counts a step. Returns a Spike if the run must roll back; raises DivergedError if the run cannot recover."""
        g = self.config
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            reason = f"step {step} has loss {loss} and gradient norm {grad_norm}"
            if self.skipped_in_a_row <= g.skips:
                return None
            if not g.spike:
                before = f", and the {g.skips} steps before it were skipped too" if g.skips else ""
                raise DivergedError(f"{reason}{before}{self._advice()}")
            return self._spike(step, reason)
        self.skipped_in_a_row = 0
        if g.spike and len(self.losses) == g.window and loss > (median := statistics.median(self.losses)) + g.spike:
            return self._spike(step, f"step {step} has loss {loss:.3f}, the median of the last {g.window} is {median:.3f}")
        self.losses = [*self.losses, loss][-g.window:] if g.spike else []
        return None

    def _spike(self, step: int, reason: str) -> Spike:
        if self.rollbacks_since_save == self.config.rollbacks:
            raise DivergedError(f"{reason}, and {self.rollbacks_since_save} rollbacks did not help{self._advice()}")
        return Spike(step, reason)

    def _advice(self) -> str:
        t = self.train
        return (f": the checkpoints are from earlier steps; start in another --workdir with a lower learning rate (train.lr is "
                f"{t.lr}) or a lower gradient clip (train.clip is {t.clip})")

    def record_stream(self, step: int, stream) -> None:
        """Remembers the state of the data stream after the batch of `step` was read."""
        if self.config.spike:
            self.stream_states = {step - 1: self.stream_states.get(step - 1), step: stream.state()}

    def roll_back(self, spike: Spike, stream, restore):
        """Restores the last checkpoint, but leaves the stream after the data of the spike and of guard.beyond more steps.

        `restore` reads the last checkpoint and returns it as a `loop.State`, which this function returns.
        """
        stream.restore(self.stream_states[spike.step])
        for _ in range(self.config.beyond * self.train.micro_batches(self.train.tokens_seen(spike.step))):
            stream.next()
        state = restore()
        stream.rewind_step_count(state.position["stream"])
        self.restore(state.position.get("guard"))
        self.rollbacks_since_save += 1      # those to this checkpoint are not in its own count
        self.rollbacks += self.rollbacks_since_save
        return state

    def saved(self) -> None:
        """Resets the count of rollbacks to the same checkpoint: there is a new one."""
        self.rollbacks_since_save = 0
