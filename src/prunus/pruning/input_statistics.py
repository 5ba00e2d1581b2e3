"""The inputs of every linear of a model, as sums: in memory, or in a safetensors file.

A file has for each linear `NAME/sum_squares` (float64) and, if asked for, `NAME/gram` (float32).
Linears with the very same input share the sums of the first one; the header says so.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from prunus.distributed import is_rank_0, on_rank_0, process_group
from prunus.engine.block.collect_statistics import collect_statistics
from prunus.engine.calibration_windows import calibration_windows, given_windows
from prunus.engine.linear_options import LinearOptions
from prunus.engine.run_options import RunOptions
from prunus.engine.session import shown_session
from prunus.methods.own_code import GIVEN
from prunus.methods.statistics import InputStatistics, Needs
from prunus.methods.table import Method
from prunus.model.checkpoint.tensor_files import Checkpoint, save_safetensors
from prunus.model.linears import Linear
from prunus.options import takes
from prunus.pruning.masks import SUFFIX, check_file, open_stored
from prunus.pruning.options import PruningOptions
from prunus.pruning.prune import Pruning


@takes(
    *(LinearOptions, RunOptions),
    without=("calibration", "damping", "dense_weight", "overwrite", "resume"),
)
def statistics(
    model: str | Path | nn.Module,
    tokens: str | Path | torch.Tensor | Sequence[Any] | None = None,
    needs: Needs = "norms",
    output: str | Path | None = None,
    *,
    progress: Callable[..., None] | bool | None = True,
    announce: Callable[[Any], None] | None = None,
    **options: Any,
) -> Mapping[str, InputStatistics]:
    """Measure the inputs of every linear of the dense model, with one block in memory at a time.

    Args:
        model: A checkpoint folder, a hub id, or a loaded model; or a file that this function wrote,
            which is read and needs no other argument.
        tokens: Token ids (windows, tokens), or all else that `prunus.prune` takes as `calibration`.
        needs: "norms" or "gram"; see `prunus.methods.InputStatistics`.
        output: Safetensors file for the sums, which are then not kept in memory; None keeps them.
        progress: As for `prunus.prune`.
        announce: As for `prunus.prune`.
        **options: Options of `prunus.prune` that choose windows and linears, and of the run.

    Returns:
        Full name of a linear -> the statistics of its inputs, block by block. Linears with the very
        same input share one object. Those of a file are read when they are asked for.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, OSError: As `prunus.prune`.
    """
    if not isinstance(model, nn.Module) and Path(model).suffix == SUFFIX:
        return StoredStatistics(Path(model))
    if needs not in ("norms", "gram"):
        raise ValueError(f"statistics are norms or gram, not {needs!r}")
    target = None if output is None else check_file(output, "statistics", model, tokens)
    work, given = RunOptions.pick(options)
    data, described = given_windows(tokens)
    chosen = LinearOptions.read(None, given | described).model_dump(exclude_unset=True)
    method = Method(name="statistics", summary="measure", function="", needs=needs)
    recipe = PruningOptions(method=f"{GIVEN}{method.name}", **chosen)
    how = RunOptions(**work, **data, own_method=method)
    found: dict[str, InputStatistics] = {}
    with (
        process_group(how.rank_timeout),
        tempfile.TemporaryDirectory(dir=target and target.parent, prefix=".prunus-") as folder,
        shown_session("statistics", progress, announce) as session,
    ):
        plan = Pruning(model, None, recipe, how).plan(session)
        ids = calibration_windows(plan).ids
        spill_folder, parts = Path(folder), _Parts(Path(folder))

        def keep(name: str, _linear: Linear, inputs: InputStatistics) -> None:
            if target is None:
                found[name] = inputs
            elif is_rank_0():
                parts.add(name, inputs)

        collect_statistics(plan, session, ids, {}, needs, keep, spill_folder)
        if target is None:
            return found
        on_rank_0(lambda: parts.join(target))
    return StoredStatistics(target)


class StoredLinear(NamedTuple):
    """What the header of a file says of one linear."""

    tokens: int  #: how many tokens reached it
    sums: str  #: the linear whose sums are its own


class StoredStatistics(Mapping[str, InputStatistics]):
    """The statistics in a file. Each is read when it is asked for.

    Args:
        path: What `statistics` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds no statistics.
    """

    def __init__(self, path: Path) -> None:
        self._checkpoint, self._linears = open_stored(path, "statistics", dict[str, StoredLinear])
        for linear in self._linears.values():
            if f"{linear.sums}/sum_squares" not in self._checkpoint.tensors:
                raise ValueError(f"{path} is damaged: it has no sums of {linear.sums}")

    def __getitem__(self, name: str) -> InputStatistics:
        linear, stored = self._linears[name], self._checkpoint
        gram = f"{linear.sums}/gram"
        return InputStatistics.of_sums(
            linear.tokens,
            stored.whole(f"{linear.sums}/sum_squares"),
            stored.whole(gram) if gram in stored.tensors else None,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


class _Parts:
    """Files with the sums of one linear each, until all are known and can be joined to one file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[str] = []
        # What the header of the file will say of each linear.
        self._linears: dict[str, StoredLinear] = {}
        self._last: tuple[str, InputStatistics] | None = None

    def add(self, name: str, inputs: InputStatistics) -> None:
        """Write the sums of a linear, if they are not those of the linear before it."""
        if self._last is None or self._last[1] is not inputs:
            self._last = name, inputs
            tensors = {f"{name}/sum_squares": inputs.sum_squares_I}
            if inputs.gram_II is not None:
                tensors[f"{name}/gram"] = inputs.gram_II
            self._files.append(f"{len(self._files)}{SUFFIX}")
            save_safetensors(self._folder / self._files[-1], tensors)
        self._linears[name] = StoredLinear(inputs.tokens, self._last[0])

    def join(self, path: Path) -> None:
        """Write one file of all parts."""
        checkpoint = Checkpoint(self._folder, only=self._files)
        tensors = checkpoint.file_tensors(checkpoint.tensors)
        save_safetensors(path, tensors, {"statistics": json.dumps(self._linears)})
