"""Histograms of one pruned linear: weights and scores, before and after, kept and removed.

The weights come from the two checkpoints. Wanda's score needs the norms of the inputs, which no
checkpoint contains. So some calibration windows are run again through the finished blocks before
the linear and through its own block: a linear is pruned on the outputs of pruned linears, which are
those of the finished model.

Legend: O outputs, I inputs of a linear.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunus.methods import METHODS
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import WANDA, wanda_score
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.linears import Linear
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.stream import Stream
from prunus.pruning.block.hooks import input_hooks
from prunus.pruning.calibration_windows import calibration_windows
from prunus.pruning.job import PruningJob, RunOptions
from prunus.pruning.manifest import Manifest
from prunus.pruning.plan import plan_run

__all__ = ["LinearHistograms", "linear_histograms"]

BINS = 80
#: Share of the weights, or of the scores, that may lie outside the outermost edges. A few outliers
#: would otherwise squeeze all others into a few bins.
_OUTSIDE = 1e-3


@dataclass(frozen=True)
class LinearHistograms:
    """Counts per bin. There is one edge more than there are counts.

    Attributes:
        linear: full name of the linear.
        weight_edges: edges of the bins of weights.
        before: counts of the dense weights; None if the dense checkpoint was not found.
        after: counts of the weights that were kept, as they are stored now.
        removed: counts of the weights that were removed, by their dense value; None as for
            `before`.
        outside: number of weights outside the edges, in both checkpoints together.
        score: what the score is, in words. Empty without scores.
        score_edges: edges of the bins of log10(score).
        score_kept: counts of the scores of weights that were kept. Scores of zero have no logarithm
            and are not counted.
        score_removed: the same for weights that were removed.
        notes: what is missing and why, and what a reader must know.
    """

    linear: str
    weight_edges: tuple[float, ...]
    before: tuple[int, ...] | None
    after: tuple[int, ...]
    removed: tuple[int, ...] | None
    outside: int
    score: str = ""
    score_edges: tuple[float, ...] = ()
    score_kept: tuple[int, ...] = ()
    score_removed: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def linear_histograms(
    folder: Path,
    linear: str,
    *,
    dense: str | None = None,
    samples: int = 8,
    options: RunOptions | None = None,
) -> LinearHistograms:
    """Histograms of one linear of a finished run.

    Args:
        folder: the pruned checkpoint, with its `prunus.json` and its weights.
        linear: full name, such as `model.layers.3.mlp.down_proj`.
        dense: the dense checkpoint, if it is not any more where the run found it.
        samples: number of calibration windows for the norms of the inputs, at most those of the
            run.
        options: device, data folder, trust in remote code. Without a data folder, the text comes
            from where the run took it.

    Raises:
        FileNotFoundError: there is no such run, or its weights are gone.
        ValueError: the run has no such linear (the message has close names), or `dense` is another
            checkpoint.
    """
    options = options or RunOptions()
    manifest = Manifest.load(folder)
    if options.data_dir is None and manifest.data_dir and Path(manifest.data_dir).is_dir():
        options = dataclasses.replace(options, data_dir=Path(manifest.data_dir))
    block, name = _find_linear(manifest, linear)
    pruned = CheckpointSource(folder, options.trust_remote_code)
    after_OI = _weight(pruned, block, name, options)
    try:
        source = CheckpointSource(
            resolve_folder(dense or manifest.source), options.trust_remote_code
        )
    except FileNotFoundError as fault:
        edges = _symmetric_edges(after_OI)
        kept, outside = _counts(after_OI[after_OI != 0], edges)
        note = f"The dense checkpoint was not found, so what was removed is not shown: {fault}"
        return LinearHistograms(linear, _as_tuple(edges), None, kept, None, outside, notes=(note,))
    if source.fingerprint != manifest.inputs.checkpoint:
        raise ValueError(
            f"{dense or manifest.source} is not the checkpoint that {folder} was pruned from: "
            "its fingerprint differs"
        )
    before_OI = _weight(source, block, name, options)
    edges = _symmetric_edges(before_OI)
    removed_OI = (after_OI == 0) & (before_OI != 0)
    before, outside = _counts(before_OI, edges)
    after, outside_after = _counts(after_OI[~removed_OI], edges)
    found = LinearHistograms(
        linear,
        _as_tuple(edges),
        before,
        after,
        _counts(before_OI[removed_OI], edges)[0],
        outside + outside_after,
    )
    try:
        score_OI, score, notes = _scores(
            manifest, source, pruned, (block, name), before_OI, samples, options
        )
    except (ValueError, FileNotFoundError, ModuleNotFoundError, OSError) as fault:
        note = f"No scores, which need the calibration text: {fault}"
        return dataclasses.replace(found, notes=(note,))
    positive_OI = score_OI > 0
    edges = _log_edges(score_OI[positive_OI])
    kept, outside_kept = _counts(score_OI[positive_OI & ~removed_OI].log10(), edges)
    removed, outside_removed = _counts(score_OI[positive_OI & removed_OI].log10(), edges)
    if missing := outside_kept + outside_removed:
        notes = (*notes, f"{missing:,} lower scores lie outside the plot.")
    return dataclasses.replace(
        found,
        score=score,
        score_edges=_as_tuple(edges),
        score_kept=kept,
        score_removed=removed,
        notes=notes,
    )


def _find_linear(manifest: Manifest, linear: str) -> tuple[int, str]:
    """Index of the block of a linear, and the linear's name within the block."""
    known = {
        f"{b.name}.{name}": (i, name) for i, b in enumerate(manifest.blocks) for name in b.linears
    }
    if linear not in known:
        close = difflib.get_close_matches(linear, known, n=3, cutoff=0.3) or list(known)[:3]
        raise ValueError(
            f"the run pruned no linear {linear!r}; there are {len(known)}, such as "
            f"{', '.join(close)}"
        )
    return known[linear]


def _linear(skeleton: Skeleton, block: int, name: str) -> Linear:
    return next(linear for linear in skeleton.linears(block) if linear.name == name)


def _weight(source: CheckpointSource, block: int, name: str, options: RunOptions) -> Tensor:
    """The weight (O, I) of a linear, float32."""
    skeleton = Skeleton(source.config, source.stored_dtype, options.trust_remote_code)
    source.bind(skeleton)
    stored = source.block(block)[f"{name}.weight"]
    return (stored.T if _linear(skeleton, block, name).transposed else stored).float()


def _scores(
    manifest: Manifest,
    dense: CheckpointSource,
    pruned: CheckpointSource,
    place: tuple[int, str],
    before_OI: Tensor,
    samples: int,
    options: RunOptions,
) -> tuple[Tensor, str, tuple[str, ...]]:
    """Scores (O, I) of the dense weights, what they are in words, and notes for the reader.

    Args:
        manifest: the manifest of the run.
        dense: the checkpoint that was pruned.
        pruned: the result.
        place: index of the block, and the linear's name within it.
        before_OI: the dense weight.
        samples: number of calibration windows.
        options: device, data folder, trust in remote code.
    """
    method = METHODS[manifest.recipe.method]
    if method.needs == "none":
        return before_OI.abs(), "|W|", ()
    recipe = manifest.recipe.model_copy(update={"samples": min(samples, manifest.recipe.samples)})
    job = plan_run(dense.checkpoint.folder, recipe, options, decided_dtype=manifest.inputs.dtype)
    statistics = _input_norms(job, pruned, *place)
    score_OI = wanda_score(before_OI.to(job.device), statistics).cpu()
    notes = []
    if method is not WANDA:
        notes.append(f"{method.name} chooses by a score of its own; shown is Wanda's.")
    if manifest.blocks[place[0]].reconstruction is not None:
        notes.append("The block was trained after pruning; shown are the inputs after that.")
    return (
        score_OI,
        f"|W|·‖X‖, inputs of {recipe.samples} windows of {recipe.calibration}",
        tuple(notes),
    )


def _input_norms(
    job: PruningJob, pruned: CheckpointSource, block: int, name: str
) -> InputStatistics:
    """The norms of a linear's inputs, as they were when it was pruned."""
    windows = calibration_windows(job)
    linear = _linear(job.skeleton, block, name)
    statistics = InputStatistics(linear.shape[1], "norms", job.device)
    pruned.bind(job.skeleton)
    stream = Stream(job.skeleton, job.source, job.device)
    # In the original's two passes, a block is measured with its dense weights.
    own_source = job.source if job.recipe.propagate == "block" else pruned
    with torch.no_grad(), contextlib.closing(stream):
        stream.embed(windows.ids.split(job.batch), spill_to=None)
        for index in range(block):
            stream.propagate(index, pruned.block(index))
        forward = stream.forward(
            block, job.skeleton.fill(block, own_source.block(block), job.device)
        )
        with input_hooks(
            [_linear(job.skeleton, block, name)],
            lambda _, x: statistics.add(x.reshape(-1, x.shape[-1])),
        ):
            for batch in range(len(stream)):
                forward(batch)
        job.skeleton.release(block)
    return statistics


def _symmetric_edges(weight_OI: Tensor) -> Tensor:
    """Edges around zero that hold all weights but the share `_OUTSIDE` of them."""
    magnitudes = weight_OI.abs().flatten()
    rank = max(1, round(magnitudes.numel() * (1 - _OUTSIDE)))
    reach = float(magnitudes.kthvalue(rank).values) or 1.0
    return torch.linspace(-reach, reach, BINS + 1, dtype=torch.float64)


def _log_edges(score: Tensor) -> Tensor:
    """Edges of log10 of positive scores; the lowest share `_OUTSIDE` of them may lie below."""
    if not score.numel():
        return torch.linspace(-1, 0, BINS + 1, dtype=torch.float64)
    low = float(score.flatten().kthvalue(max(1, round(score.numel() * _OUTSIDE))).values.log10())
    high = float(score.max().log10())
    return torch.linspace(low, max(high, low + 1e-6), BINS + 1, dtype=torch.float64)


def _counts(values: Tensor, edges: Tensor) -> tuple[tuple[int, ...], int]:
    """Counts per bin, and the number of values outside. The last bin includes its upper edge.

    >>> _counts(torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]))
    ((2, 2), 1)
    """
    wide = values.flatten().double()
    inside = wide[(wide >= edges[0]) & (wide <= edges[-1])]
    bins = (torch.bucketize(inside, edges, right=True) - 1).clamp_(max=len(edges) - 2)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return tuple(counts.tolist()), wide.numel() - inside.numel()


def _as_tuple(edges: Tensor) -> tuple[float, ...]:
    return tuple(edges.tolist())
