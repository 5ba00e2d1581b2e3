"""A trial of the measurement of the loss on two blocks, for the time that a run takes.

Steps            hears when each step of a trial was done
try_measurement  the trial, for prune and for compress
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from prunus.engine.forecast import two_blocks
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.session import Session
from prunus.rounding.loss_sensitivity import PROBE_WINDOWS

Measured = TypeVar("Measured")


@dataclass
class Steps:
    """Hears the steps of a measurement, and knows when each was done.

    Attributes:
        times: When each was announced or done, on the clock of `time.perf_counter`.
    """

    times: list[float] = field(default_factory=list)

    @property
    def session(self) -> Session:
        """The session whose steps are heard."""
        return Session(announce=lambda _: self.times.append(time.perf_counter()))

    def parts(self) -> tuple[float, float, float]:
        """Seconds of the embedding, of the loss, and of a block, of two that were measured."""
        begun, one, two, last, done, *_ = self.times
        forward, back = two - one, done - last
        # Before the first step are the embedding and a block, before the third the loss and one.
        return one - begun - forward, last - two - back, forward + back

    def measuring(self, plan: LinearPlan, first: Steps) -> float:
        """Seconds of `measure_loss` of a run, from trials of two blocks with one and two windows.

        Args:
            plan: The run.
            first: The trial with one window, which also took what is only taken once.
        """
        embedding, one_loss, one_block = first.parts()
        _, two_losses, two_blocks = self.parts()
        windows = min(PROBE_WINDOWS, plan.recipe.samples) - 1
        loss = max(one_loss, two_losses / 2) + windows * two_losses / 2
        block = one_block + windows * max(0.0, two_blocks - one_block)
        return embedding + loss + len(plan.skeleton) * block


def try_measurement(
    plan: LinearPlan,
    windows: Tensor,
    measure: Callable[[LinearPlan, Session, Tensor, dict[str, str]], Measured],
) -> tuple[float, Measured]:
    """Seconds of a measurement of the loss in a run, from trials of it on two blocks.

    Args:
        plan: The run.
        windows: Some of its windows (windows, tokens), of which first one, then two are measured.
        measure: The measurement; its arguments are the first ones of `measure_loss`, which it
            calls.

    Returns:
        The seconds, and what `measure` returned for two windows.
    """
    first, second, few = Steps(), Steps(), two_blocks(plan)
    measure(few, first.session, windows[:1], {})
    found = measure(few, second.session, windows[:2], {})
    return second.measuring(plan, first), found
