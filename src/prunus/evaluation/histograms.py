"""How the weights and scores of one pruned linear are distributed: before and after, removed and kept.

Weights are read from the two checkpoints. Wanda's score needs the norms of the inputs, which no checkpoint holds:
some calibration windows are run again through the pruned blocks before the linear, as they were when it was pruned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunus.methods import METHODS, MethodOptions, Pruned
from prunus.methods.patterns import Pattern
from prunus.methods.statistics import InputStatistics
from prunus.methods.wanda import WANDA, wanda_score
from prunus.model.checkpoint.reader import resolve_folder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.pruning.block.prune_block import BlockPruner
from prunus.pruning.calibration_windows import calibration_windows
from prunus.pruning.job import PruningJob, RunOptions
from prunus.pruning.manifest import Manifest
from prunus.pruning.plan import plan_run

__all__ = ["LinearHistograms", "linear_histograms"]

BINS = 80
#: Share of the weights, or of the scores, that may lie beyond the outermost edges.
_BEYOND = 1e-3


@dataclass(frozen=True)
class LinearHistograms:
    """Counts per bin; there is one edge more than there are counts.

    Attributes:
        linear: full name of the linear.
        weight_edges: of the bins of weights.
        before: counts of the dense weights; None where the dense checkpoint was not at hand.
        after: counts of the weights that were kept, as stored now.
        removed: counts, by their dense value, of those that were removed; None as for `before`.
        beyond: weights outside the edges, in both checkpoints together.
        score: what was scored, in words.
        score_edges: of the bins of log10(score), empty without scores.
        score_kept, score_removed: counts of scores; scores of zero have no logarithm and are left out.
        notes: what is missing, and why.
    """

    linear: str
    weight_edges: tuple[float, ...]
    before: tuple[int, ...] | None
    after: tuple[int, ...]
    removed: tuple[int, ...] | None
    beyond: int
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
        dense: the checkpoint that was pruned, where it is not any more where the run found it.
        samples: calibration windows for the norms, at most those of the run.
        options: device, data folder, trust.

    Raises:
        FileNotFoundError: no such run, or its weights are gone.
        ValueError: the run has no such linear (names close ones), or the dense checkpoint is not the run's.
    """
    options = options or RunOptions()
    manifest = Manifest.load(folder)
    block, name = _place(manifest, linear)
    pruned = CheckpointSource(folder, options.trust_remote_code)
    after_OI = _weight(pruned, block, name, options)
    try:
        source = CheckpointSource(
            resolve_folder(dense or manifest.source), options.trust_remote_code
        )
    except FileNotFoundError as fault:
        edges = _symmetric_edges(after_OI)
        kept, beyond = _counts(after_OI[after_OI != 0], edges)
        note = f"The dense checkpoint is not at hand, so what was removed is not shown: {fault}"
        return LinearHistograms(linear, _listed(edges), None, kept, None, beyond, notes=(note,))
    if source.fingerprint != manifest.inputs.checkpoint:
        raise ValueError(
            f"{dense or manifest.source} is not the checkpoint that {folder} was pruned from: its fingerprint differs"
        )
    before_OI = _weight(source, block, name, options)
    edges = _symmetric_edges(before_OI)
    gone_OI = (after_OI == 0) & (before_OI != 0)
    before, beyond = _counts(before_OI, edges)
    after, beyond_after = _counts(after_OI[~gone_OI], edges)
    found = LinearHistograms(
        linear,
        _listed(edges),
        before,
        after,
        _counts(before_OI[gone_OI], edges)[0],
        beyond + beyond_after,
    )
    try:
        score_OI, score, notes = _scores(
            manifest, source, pruned, block, before_OI, samples, options
        )
    except (ValueError, FileNotFoundError, ModuleNotFoundError, OSError) as fault:
        note = f"No scores, which need the calibration text: {fault}"
        return dataclasses.replace(found, notes=(note,))
    positive_OI = score_OI > 0
    edges = _log_edges(score_OI[positive_OI])
    kept, beyond_kept = _counts(score_OI[positive_OI & ~gone_OI].log10(), edges)
    removed, beyond_removed = _counts(score_OI[positive_OI & gone_OI].log10(), edges)
    if outside := beyond_kept + beyond_removed:
        notes = (*notes, f"{outside:,} lower scores lie outside the plot.")
    return dataclasses.replace(
        found,
        score=score,
        score_edges=_listed(edges),
        score_kept=kept,
        score_removed=removed,
        notes=notes,
    )


def _place(manifest: Manifest, linear: str) -> tuple[int, str]:
    """Index of the block and name within it."""
    known = {
        f"{b.name}.{name}": (i, name) for i, b in enumerate(manifest.blocks) for name in b.linears
    }
    if linear not in known:
        close = difflib.get_close_matches(linear, known, n=3, cutoff=0.3) or list(known)[:3]
        raise ValueError(
            f"the run pruned no linear {linear!r}; there are {len(known)}, such as {', '.join(close)}"
        )
    return known[linear]


def _weight(source: CheckpointSource, block: int, name: str, options: RunOptions) -> Tensor:
    """The weight (out, in), float32."""
    skeleton = Skeleton(source.config, source.stored_dtype, options.trust_remote_code)
    source.bind(skeleton)
    [linear] = [x for x in skeleton.linears(block) if x.name == name]
    stored = source.block(block)[f"{name}.weight"]
    return (stored.T if linear.transposed else stored).float()


def _scores(
    manifest: Manifest,
    dense: CheckpointSource,
    pruned: CheckpointSource,
    block: int,
    before_OI: Tensor,
    samples: int,
    options: RunOptions,
) -> tuple[Tensor, str, tuple[str, ...]]:
    """Scores (out, in), what they are, and what a reader has to know about them."""
    method = METHODS[manifest.recipe.method]
    if method.needs == "none":
        return before_OI.abs(), "|W|", ()
    recipe = manifest.recipe.model_copy(update={"samples": min(samples, manifest.recipe.samples)})
    job = plan_run(dense.checkpoint.folder, recipe, options, decided_dtype=manifest.inputs.dtype)
    score_OI = _wanda_scores(job, pruned, block, before_OI)
    own = (
        ()
        if method is WANDA
        else (f"{method.name} chooses by a score of its own; shown is Wanda's.",)
    )
    return score_OI, f"|W|·‖X‖, inputs of {recipe.samples} windows of {recipe.calibration}", own


def _wanda_scores(
    job: PruningJob, pruned: CheckpointSource, block: int, before_OI: Tensor
) -> Tensor:
    """Wanda's score of the linear whose dense weight is `before_OI`, on the inputs it had when it was pruned."""
    windows = calibration_windows(job)
    pruned.bind(job.skeleton)
    inner = job.linear_settings.method
    scores: list[Tensor] = []

    def recording(
        weight_OI: Tensor,
        statistics: InputStatistics | None,
        pattern: Pattern,
        sparsity: float,
        options: MethodOptions,
    ) -> Pruned:
        if weight_OI.shape == before_OI.shape and torch.equal(weight_OI.cpu(), before_OI):
            scores.append(wanda_score(weight_OI, statistics).cpu())
        return inner.prune(weight_OI, statistics, pattern, sparsity, options)

    linear_settings = dataclasses.replace(
        job.linear_settings, method=dataclasses.replace(inner, prune=recording)
    )
    minimum = job.recipe.min_expert_tokens
    engine = BlockPruner(
        job.skeleton, job.source, linear_settings, job.device, min_expert_tokens=minimum
    )
    with torch.no_grad(), contextlib.closing(engine):
        engine.embed(windows.ids.split(job.batch), spill_to=None)
        for index in range(block):
            engine.propagate(index, pruned.block(index))
        engine.prune(block, job.source.block(block), job.selected[block], job.walk(block))
    assert scores, "the linear was not met again"
    return scores[0]


def _symmetric_edges(weight_OI: Tensor) -> Tensor:
    """Edges around zero that hold all weights but the share `_BEYOND` of them."""
    largest = weight_OI.abs().flatten()
    reach = float(largest.kthvalue(max(1, round(largest.numel() * (1 - _BEYOND)))).values) or 1.0
    return torch.linspace(-reach, reach, BINS + 1, dtype=torch.float64)


def _log_edges(score: Tensor) -> Tensor:
    """Edges of log10 of positive scores; the lowest share `_BEYOND` of them may lie below."""
    if not score.numel():
        return torch.linspace(-1, 0, BINS + 1, dtype=torch.float64)
    low = float(score.flatten().kthvalue(max(1, round(score.numel() * _BEYOND))).values.log10())
    high = float(score.max().log10())
    return torch.linspace(low, max(high, low + 1e-6), BINS + 1, dtype=torch.float64)


def _counts(values: Tensor, edges: Tensor) -> tuple[tuple[int, ...], int]:
    """Counts per bin, and how many values lie outside; the last bin holds its upper edge."""
    wide = values.flatten().double()
    inside = wide[(wide >= edges[0]) & (wide <= edges[-1])]
    bins = (torch.bucketize(inside, edges, right=True) - 1).clamp_(max=len(edges) - 2)
    counts = torch.bincount(bins, minlength=len(edges) - 1)
    return tuple(counts.tolist()), wide.numel() - inside.numel()


def _listed(edges: Tensor) -> tuple[float, ...]:
    return tuple(edges.tolist())
