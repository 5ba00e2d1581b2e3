"""The state of a training on disk: weights, the optimizer's moments, and how far the training is.

Two files lie in the folder of the result. `training.safetensors` is the state that training resumes
from. `best-<step>.safetensors` holds the weights with the lowest held-out loss. The second is
written first, and the first names it, so a kill between the two writes loses neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import nn

from prunus.distributed import is_rank_0
from prunus.engine.run_record import RecordPart
from prunus.model.checkpoint.files import remove
from prunus.model.checkpoint.tensor_files import save_safetensors
from prunus.training.evaluation import Evaluation
from prunus.words import reason

_STATE_NAME = "training.safetensors"
# Key in the metadata of that file under which `TrainingState` is stored as JSON.
_KEY = "state"
#: What is stored of each parameter: its weight, and what AdamW keeps.
_KINDS = ("weight", "step", "exp_avg", "exp_avg_sq")


class TrainingState(RecordPart):
    """How far a training is, over all attempts."""

    #: Steps of the optimizer so far.
    step: int = 0
    #: Tokens trained on so far.
    tokens: int = 0
    #: Seconds of training and evaluations so far.
    seconds: float = 0.0
    #: The evaluations so far; the first one is from before any training.
    evaluations: list[Evaluation] = Field(default_factory=list)
    #: Position in `evaluations` of the one with the lowest held-out loss.
    best: int = 0
    #: Which loss was not finite, so that training ended before the budget was spent; else None.
    stopped: str | None = None


class Checkpoints:
    """The files of one training in the folder of its result.

    Args:
        folder: The folder of the result.

    All processes read, and rank 0 writes. In all methods, `parameters` are the trained ones: name
    -> float32.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self,
        state: TrainingState,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Write the state after an evaluation, and the weights if it is the best so far."""
        if not is_rank_0():
            return
        if state.best == len(state.evaluations) - 1:
            save_safetensors(self._best(state), dict(parameters))
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"weight/{name}"] = parameter
            # Before the first step there are no moments.
            for key, moment in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = moment
        save_safetensors(self.folder / _STATE_NAME, tensors, {_KEY: state.model_dump_json()})
        for path in self.folder.glob("best-*.safetensors"):
            if path != self._best(state):
                remove(path)

    def load_state(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainingState | None:
        """Restore weights and moments, and return the state; None if there is nothing to resume.

        Raises:
            ValueError: The state is damaged. The message names the file, and nothing is restored.
        """
        path = self.folder / _STATE_NAME
        if not path.exists():
            return None
        with _opened(path) as file:
            state = TrainingState.model_validate_json((file.metadata() or {})[_KEY])
            if not 0 <= state.best < len(state.evaluations):
                raise ValueError(f"evaluation {state.best} of {len(state.evaluations)}")
            if not self._best(state).exists():
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            _check_tensors(tensors, parameters)
        with torch.no_grad():
            for key, tensor in tensors.items():
                kind, _, name = key.partition("/")
                if kind == "weight":
                    parameters[name].copy_(tensor)
                else:
                    moment = tensor.to(parameters[name].device)
                    optimizer.state[parameters[name]][kind] = moment
        return state

    def load_best(self, state: TrainingState, parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore the weights with the lowest held-out loss.

        Raises:
            ValueError: Their file is damaged; the message names it.
        """
        with _opened(self._best(state)) as file, torch.no_grad():
            for name, parameter in parameters.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {tuple(tensor.shape)}")
                parameter.copy_(tensor)

    def clear(self) -> None:
        """Delete the files: the result is in place, or a new training begins."""
        for path in (self.folder / _STATE_NAME, *self.folder.glob("best-*.safetensors")):
            remove(path)

    def _best(self, state: TrainingState) -> Path:
        return self.folder / f"best-{state.evaluations[state.best].step:08d}.safetensors"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of tensors that is open for reading; an error about its content names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (
        *(SafetensorError, ValueError, OSError),
        *(LookupError, TypeError, AttributeError, RecursionError),
    ) as fault:
        raise ValueError(
            f"{path} is damaged ({reason(fault)}), so the training cannot continue from it; "
            "`overwrite` it to start again"
        ) from fault


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Check that a stored state has a weight for every parameter, and nothing of another shape.

    Raises:
        ValueError: It does not, or holds a number that is not finite.
    """
    for name in parameters:
        if f"weight/{name}" not in tensors:
            raise ValueError(f"there is no weight {name}")
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(f"{key} belongs to no parameter")
        shape = torch.Size() if kind == "step" else parameter.shape
        if kind not in _KINDS or tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{key} is of another kind or shape")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{key} is not finite")
