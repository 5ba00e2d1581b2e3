"""The command prune: what users call, and the format of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.engine.command import run_verb
from prunus.engine.forecast import Trial
from prunus.engine.linear_command import LinearCommand
from prunus.engine.linear_plan import LinearPlan, LinearSelection, LinearStep, Storage
from prunus.engine.run_options import RunOptions
from prunus.engine.session import shown_session
from prunus.methods.own_code import GIVEN
from prunus.methods.table import Method
from prunus.model.checkpoint.tensor_files import Checkpoint
from prunus.model.kinds import kind_of
from prunus.model.skeleton import Skeleton
from prunus.model.source import ModuleSource, OpenModel
from prunus.options import takes
from prunus.pruning.allocate_sparsity import measured_curves
from prunus.pruning.manifest import Manifest, pruned_card
from prunus.pruning.pruning_step import fit_to_model, pruning_step
from prunus.pruning.recipe import Recipe
from prunus.rounding.measuring_trial import try_measurement


@takes(Recipe, RunOptions)
def prune(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    method: str | Method | None = None,
    sparsity: float | Mapping[str, float] | Sequence[float] | None = None,
    *,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: Recipe | str | Path | None = None,
    progress: Callable[..., None] | bool | None = True,
    announce: Callable[[Any], None] | None = None,
    **options: Any,
) -> Manifest:
    """Prune a checkpoint into a new folder, or a loaded model in place.

    Args:
        model: A checkpoint folder, a hub id, or a loaded transformers model.
        output: Folder of the pruned checkpoint; None for a loaded model.
        method: How weights are chosen: the name of a method, FILE.py:NAME for your own in a file,
            or a `prunus.methods.Method`.
        sparsity: Share of each linear's weights to remove; or by hand: globs of names -> shares, of
            which the first that matches counts, or a share for each block.
        calibration: A source of windows by name or file, token ids (samples, seqlen), pixel values
            (samples, channels, height, width), texts, rows of a data set, or chats.
        recipe: A `Recipe`, or a TOML file with any of its options.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called after every block with a `prunus.engine.progress.Progress`.
        announce: Called with what is being prepared before the first block.
        **options: Options of `Recipe` and of the run. `allocation` may be a function; see
            `prunus.pruning.allocate_sparsity`. `masks` may be a dictionary: full name of a linear
            -> bool (out, in), True where the weight is removed.

    Returns:
        The manifest: recipe, inputs, totals, and for each linear its shape, sparsity, error and
        seconds. In a checkpoint it is also the file `prunus.json`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
        RankError: Under torchrun, another process was lost or failed; names it.
    """
    if isinstance(model, nn.Module) and output is not None:
        raise ValueError(
            "a loaded model is pruned in place: leave output out and call its save_pretrained "
            "afterwards"
        )
    if not isinstance(model, nn.Module) and output is None:
        raise ValueError("a checkpoint is pruned into a new folder: give output")
    if isinstance(options.get("masks"), Mapping):
        options |= {"own_masks": options["masks"], "masks": GIVEN}
    if isinstance(method, Method):
        options["own_method"], method = method, f"{GIVEN}{method.name}"
    if callable(own := options.get("allocation")):
        options["own_allocation"] = own
        options["allocation"] = f"{GIVEN}{getattr(own, '__name__', type(own).__name__)}"
    options |= {"method": method, "sparsity": sparsity}
    command = Pruning.of(model, output, recipe, options, calibration)
    with shown_session("prune", progress, announce) as session:
        return run_verb(command, session)


class PlainTensors(Storage):
    """A pruned checkpoint: tensors and configuration are those of the source."""

    def file_bytes(self, choice: Any = None) -> int:
        """Bytes of the weights of the source; 0 for a loaded model, which has no files."""
        if isinstance(self.source, ModuleSource):
            return 0
        return self.source.checkpoint.nbytes(self.source.checkpoint.tensors)

    def config(self, record: Manifest) -> None:
        """That of the source."""

    def note_size(self, record: Manifest, written: Checkpoint) -> None:
        """A manifest has no size of files."""

    def card(self, record: Manifest) -> str:
        """The model card of a pruned checkpoint, or of a loaded model that was pruned."""
        source = self.source
        folder = None if isinstance(source, ModuleSource) else source.checkpoint.folder
        nbytes = None if folder is None else self.file_bytes()
        return pruned_card(record, kind_of(source.config).loader, folder, nbytes)


class Pruning(LinearCommand[Manifest]):
    """The command prune, as the engine knows it."""

    RECIPE, KIND = Recipe, Manifest

    def step(self) -> LinearStep:
        """See `pruning_step`."""
        return pruning_step(self.recipe, self.options)

    def fit(
        self, step: LinearStep, skeleton: Skeleton, linears: LinearSelection
    ) -> tuple[LinearStep, LinearSelection]:
        """See `fit_to_model`."""
        return fit_to_model(self.recipe, self.options, step, skeleton, linears)

    def trial(self, plan: LinearPlan, windows: torch.Tensor) -> Trial:
        """What the allocation measures."""
        if plan.recipe.measures != "loss":
            return Trial()
        return Trial(try_measurement(plan, windows, measured_curves)[0])

    def storage(self, opened: OpenModel, selection: LinearSelection) -> PlainTensors:
        """Plain tensors."""
        return PlainTensors(source=opened.source, selection=selection)
