"""The command compress: what users call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.compression.type_rounding import try_types, type_rounding
from prunus.distributed import ranks
from prunus.distributed.group import started_by_torchrun
from prunus.engine.command import Run, run_verb
from prunus.engine.forecast import Trial
from prunus.engine.linear_command import LinearCommand
from prunus.engine.linear_plan import LinearPlan, LinearSelection, LinearStep
from prunus.engine.output import Rounding
from prunus.engine.result import Result
from prunus.engine.run_options import RunOptions
from prunus.engine.session import shown_session
from prunus.formats.codec import Codec, codec_for, size_plan_for
from prunus.methods.method_options import MethodOptions
from prunus.methods.work import Work
from prunus.model.source import OpenModel
from prunus.options import takes
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.compression_record import CompressionRecord
from prunus.rounding.loss_sensitivity import measuring_bytes
from prunus.rounding.rounding_method import rounding_method
from prunus.rounding.size_plan import SizePlan


@takes(CompressionRecipe, RunOptions)
def compress(
    model: str | Path,
    output: str | Path,
    bits: float | None = None,
    *,
    calibration: str | Path | torch.Tensor | Sequence[Any] | None = None,
    recipe: CompressionRecipe | str | Path | None = None,
    progress: Callable[..., None] | bool | None = True,
    announce: Callable[[Any], None] | None = None,
    **options: Any,
) -> CompressionRecord:
    """Compress a checkpoint to a file size or to bits per weight.

    Args:
        model: A checkpoint folder or a hub id; for a GGUF file also one in full precision.
        output: NAME.gguf for a GGUF file, or a folder, of format compressed-tensors or mlx.
        bits: Bits per weight, with all that belongs to them; None if `size` says how large the
            whole file may be. With `format` compressed-tensors, 4 and 8 give all linears these
            bits, scales not counted.
        calibration: A source of windows, token ids or texts, as for `prunus.prune`.
        recipe: A `CompressionRecipe`, or a TOML file with any of its options.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called after every block with a `prunus.engine.progress.Progress`.
        announce: Called with what is being prepared before the first block.
        **options: Options of `CompressionRecipe` and of the run.

    Returns:
        The record, which is also the file `prunus-compress.json`; its totals have the bits that the
        linears take.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, OSError: As `prune`.
    """
    options["bits"] = bits
    command = Compression.of(model, output, recipe, options, calibration)
    with shown_session("compress", progress, announce) as session:
        return run_verb(command, session)


@dataclass(frozen=True)
class Compression(LinearCommand[CompressionRecord]):
    """The command compress, as the engine knows it.

    Attributes:
        given_codec: The format of the result; None for that of the output or of the recipe.
    """

    RECIPE, KIND = CompressionRecipe, CompressionRecord

    given_codec: type[Codec] | None = None

    @property
    def codec(self) -> type[Codec]:
        """The format of the result."""
        return self.given_codec or codec_for(self.output, self.recipe)

    @property
    def result(self) -> Result[CompressionRecord] | None:
        """Where the result is written, which the format says; None for nowhere."""
        return None if self.output is None else self.codec.RESULT(self.output, self.KIND)

    @classmethod
    def completed(
        cls, model: Any, recipe: Any, options: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """See `Command.completed`. Of several processes, no preset trains."""
        if started_by_torchrun() and recipe is None and options.get("tune") is None:
            options = {**options, "tune": 0}
        return options, {}

    def step(self) -> LinearStep:
        """Rounding, as a method without zeros."""
        recipe = self.recipe
        if recipe.tune and ranks().size > 1:
            raise ValueError(
                "`tune` trains in one process: run compress without torchrun, or give `tune` 0"
            )
        options = MethodOptions(damping=recipe.damping, dense_weight=recipe.dense_weight)
        return LinearStep(
            method=rounding_method(recipe.rounds, options),
            work=Work(options=options),
            measuring_bytes=_bytes_by_loss,
        )

    def storage(self, opened: OpenModel, selection: LinearSelection) -> SizePlan:
        """Which weights have types, and what all may take."""
        result = None if self.options.overwrite else self.result
        folder = None if result is None else result.folder
        return size_plan_for(self.codec, self.recipe, folder, opened, selection)

    def trial(self, plan: LinearPlan, windows: torch.Tensor) -> Trial:
        """The types as well; see `LinearCommand.trial`."""
        return try_types(plan, windows, self.recipe.tune)

    def rounding(self, run: Run[LinearPlan, CompressionRecord]) -> Rounding:
        """The types of least loss."""
        return type_rounding(run, self.codec)


def _bytes_by_loss(plan: LinearPlan) -> int:
    """Bytes of the measurement that the choice of types or the fit of scales needs."""
    if not plan.storage.measures_loss:
        return 0
    return measuring_bytes(plan, feedback=plan.recipe.rounds == "feedback")
