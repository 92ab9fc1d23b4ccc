"""What watches over training: a step whose loss or gradient is no number changes nothing, a spike takes the run back.

The update itself leaves parameters and optimizer as they are where the loss or the gradient's norm is not finite
(`train.train_step`); here such steps are counted. A spike is a loss more than guard.spike nats above the median of the last
guard.window ones: the run goes back to its last checkpoint and leaves out the data read since, for the same parameters on
the same data would spike again. What helps no more ends the run (`DivergedError`). The state is part of a checkpoint, so that a
resumed run does what the uninterrupted one does.
"""
import math
import statistics

from mmx import config
from mmx.config import ConfigError


class DivergedError(ConfigError):
    """The run cannot recover; started again, it would end here again."""
    code = 4


class Guard:
    """`skipped` steps changed nothing, the run went back `rollbacks` times."""

    def __init__(self, e: config.Experiment):
        self.config, self.skipped, self.rollbacks = e.guard, 0, 0
        self.row = 0            # skipped steps in a row
        self.here = 0           # rollbacks since the last checkpoint
        self.losses = []        # the last ones that are no spike
        self.advice = (f": lower train.lr={e.train.lr} or train.clip={e.train.clip}, in another --workdir; the "
                       "checkpoints here are from before")

    def state(self) -> dict:
        return {"skipped": self.skipped, "rollbacks": self.rollbacks, "row": self.row, "losses": self.losses.copy()}

    def restore(self, state: dict | None) -> None:
        """`state` None: of a run that nothing watched, or of a new one."""
        state = state or {"skipped": 0, "rollbacks": 0, "row": 0, "losses": []}
        self.skipped, self.rollbacks, self.row, self.losses = (
            state["skipped"], state["rollbacks"], state["row"], state["losses"].copy())

    def see(self, step: int, loss: float, grad_norm: float) -> str:
        """What takes the run back to its last checkpoint, "" where nothing does; raises DivergedError."""
        g = self.config
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped, self.row = self.skipped + 1, self.row + 1
            told = f"step {step} has loss {loss}, gradient norm {grad_norm}"
            if self.row <= g.skips:
                return ""
            if not g.spike:
                raise DivergedError(told + f", as the {g.skips} steps before it" * bool(g.skips) + self.advice)
            return self._back(told)
        self.row = 0
        if g.spike and len(self.losses) == g.window and loss > (usual := statistics.median(self.losses)) + g.spike:
            return self._back(f"step {step} has loss {loss:.3f}, usual is {usual:.3f}")
        self.losses = [*self.losses, loss][-g.window:] if g.spike else []
        return ""

    def _back(self, told: str) -> str:
        if self.here == self.config.rollbacks:
            raise DivergedError(f"{told}, and {self.here} rollbacks did not help{self.advice}")
        return told

    def went_back(self, state: dict | None) -> None:
        """The run is at a checkpoint whose guard had `state`."""
        self.restore(state)
        self.here += 1
        self.rollbacks += self.here

    def saved(self) -> None:
        """There is a checkpoint behind the last rollback."""
        self.here = 0
