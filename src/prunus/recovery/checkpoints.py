"""The state of a training on disk: weights, the optimizer's moments, and how far the training is.

Two files lie in the folder of the result. `training.safetensors` is the state that training resumes
from. `best-<step>.safetensors` holds the weights with the lowest held-out loss. The second is
written first, and the first names it, so a kill between the two writes loses neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from torch import nn

from prunus.model.checkpoint.writer import save_safetensors
from prunus.recovery.record import Evaluation

__all__ = ["Checkpoints", "TrainingState"]

_STATE_NAME = "training.safetensors"
_KEY = "state"


class TrainingState(BaseModel):
    """How far a training is.

    Attributes:
        step: steps of the optimizer so far.
        tokens: tokens trained on so far.
        seconds: of training and evaluation so far, over all attempts.
        evaluations: so far; the first one is from before any training.
        best: number of the evaluation with the lowest held-out loss.
        stopped: why training ended before the budget was spent, or None.
        diverged: training ended because the loss was not finite.
    """

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluations: list[Evaluation] = Field(default_factory=list)
    best: int = 0
    stopped: str | None = None
    diverged: bool = False


class Checkpoints:
    """The files of one training.

    Args:
        folder: of the result.
        writes: True on the rank that writes; all ranks read.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        self._writes = writes

    def save(
        self,
        state: TrainingState,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write the state after an evaluation, and the weights if it is the best so far."""
        if not self._writes:
            return
        if state.best == len(state.evaluations) - 1:
            save_safetensors(self._best(state), dict(parameters))
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"weight/{name}"] = parameter
            for key, moment in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = moment
        save_safetensors(self.folder / _STATE_NAME, tensors, {_KEY: state.model_dump_json()})
        for path in self.folder.glob("best-*.safetensors"):
            if path != self._best(state):
                path.unlink()

    def load(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainingState | None:
        """Restore weights and moments, and return the state; None if there is nothing to resume."""
        path = self.folder / _STATE_NAME
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file, torch.no_grad():
            state = TrainingState.model_validate_json(file.metadata()[_KEY])
            if not self._best(state).exists():
                return None
            for key in file.keys():  # noqa: SIM118
                kind, _, name = key.partition("/")
                if kind == "weight":
                    parameters[name].copy_(file.get_tensor(key))
                else:
                    moment = file.get_tensor(key).to(parameters[name].device)
                    optimizer.state[parameters[name]][kind] = moment
        return state

    def load_best(self, state: TrainingState, parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore the weights with the lowest held-out loss."""
        with safe_open(self._best(state), framework="pt") as file, torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))

    def clear(self) -> None:
        """Delete the files: the result is in place, or a new training begins."""
        for path in (self.folder / _STATE_NAME, *self.folder.glob("best-*.safetensors")):
            path.unlink(missing_ok=True)

    def _best(self, state: TrainingState) -> Path:
        return self.folder / f"best-{state.evaluations[state.best].step:08d}.safetensors"
