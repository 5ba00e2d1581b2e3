"""The loop over windows: loss, and how far the predictions are from those of a reference.

The logits of windows are those of a model in memory (`WholeModel`), or of a model that is read
block by block (`StreamedModel`).

What is compared with a reference is in `metrics`.

Legend: W windows, B windows at once, S tokens per window, T rows of logits, V vocabulary,
M models.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional

from prunus.calibration.windows import check_context, check_ids
from prunus.distributed import own_part, ranks
from prunus.document import Measured
from prunus.evaluation.eval_records import Divergence
from prunus.evaluation.metrics import METRICS, TokenMeasure, exponential, mean
from prunus.hardware.numerics import fast_linears
from prunus.methods.divergence import kl_divergence

#: Rows of logits (one per token) that are in float32 at the same time. A whole window of 2048
#: tokens and a vocabulary of 128,000 would take 1 GB in float32.
ROWS = 512
#: Rows of logits that are compared at the same time. A row takes some six rows in float32.
_PIECE = 32

#: A function of (first, stop) that returns the logits (T, V) of these rows of a window, in the
#: dtype of the model. Row t predicts token t + 1.
Rows = Callable[[int, int], torch.Tensor]
#: Called with the number of windows done, and the number of all windows.
WindowProgress = Callable[[int, int], None]


class LogitsSource(Protocol):
    """A model that gives the logits of windows."""

    #: The dtype in which the model computes.
    dtype: torch.dtype
    #: The transformers model, which may be without weights, for `check_windows`.
    model: Any

    def windows(
        self, ids: torch.Tensor, batch: int, progress: WindowProgress, models: int
    ) -> Generator[Rows, None, None]:
        """The logits of every window, in order. Read them before the next window is taken.

        `ids` are int64 (W, S); W may be 0. `progress` counts shares of windows: half of the blocks
        for all W windows are W / 2. `models` of this size share the memory, this one included.
        """


class WholeModel:
    """A loaded transformers model, a `LogitsSource`.

    It is scored in evaluation mode, on its device, and is left in the mode that it was in.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        embedding = model.get_input_embeddings()
        self._device: torch.device = embedding.weight.device
        self.dtype: torch.dtype = embedding.weight.dtype

    def windows(
        self, ids: torch.Tensor, batch: int, progress: WindowProgress, models: int
    ) -> Generator[Rows, None, None]:
        """The logits of every window; see `LogitsSource`. The model is in memory as it is."""
        was_training = self.model.training
        self.model.eval()
        done = 0
        try:
            for ids_BS in ids.split(batch) if len(ids) else ():
                yield from map(rows_of, self._logits(ids_BS))
                done += len(ids_BS)
                progress(done, len(ids))
        finally:
            self.model.train(was_training)

    # The mode ends before a window is handed out, so it never holds for the caller.
    @torch.inference_mode()
    def _logits(self, ids_BS: torch.Tensor) -> torch.Tensor:
        ids_BS = ids_BS.to(self._device)
        logits: torch.Tensor = self.model(input_ids=ids_BS, use_cache=False).logits
        return logits


def rows_of(logits_SV: torch.Tensor) -> Rows:
    """The logits of one window as a function of the first row and the row after the last."""
    return lambda first, stop: logits_SV[first:stop]


def check_windows(model: Any, ids: torch.Tensor, name: str) -> None:
    """Check that token ids (W, S) are in the vocabulary, and that windows fit in the context.

    `model` is a transformers model, with or without weights.

    Raises:
        ValueError: They do not.
    """
    check_ids(ids, model.get_input_embeddings().num_embeddings, f"the token ids for {name}")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_context(positions, ids.shape[1], name)


@dataclass(frozen=True, eq=False)
class WindowScores:
    """The figures of one model for all windows of all ranks.

    M is 1, or 2 with a reference, which comes first. T are the scored tokens of a window.
    """

    #: Mean loss of every window in nats per token, float64.
    losses_WM: torch.Tensor
    #: What the metrics measure -> its value for every scored token (W, T), float64; empty without a
    #: reference.
    values: dict[TokenMeasure, torch.Tensor]

    @property
    def loss(self) -> float:
        """The model's mean loss, added window by window: the number of ranks changes no bit."""
        losses: list[float] = self.losses_WM[:, -1].tolist()
        total = 0.0
        for loss in losses:
            total += loss
        return total / len(losses)

    def means_by_window(self) -> dict[str, tuple[float, ...]]:
        """Name of a metric that is a mean -> its mean over each window; and `loss`, in nats.

        Empty without a reference: only models that share a vocabulary can be compared.
        """
        if not self.values:
            return {}
        means = {
            metric.name: self.values[metric.measure].mean(dim=1)
            for metric in METRICS
            if metric.measure is not None and metric.summary is mean
        }
        means["loss"] = self.losses_WM[:, 1]
        return {name: tuple(means_W.tolist()) for name, means_W in means.items()}

    def largest_kl(self) -> tuple[int, int]:
        """The window and the row, among the scored ones, with the largest KL divergence."""
        values_WT = self.values[kl_divergence]
        window, row = divmod(int(values_WT.argmax()), values_WT.shape[1])
        return window, row

    @classmethod
    def joined(cls, parts: Sequence[WindowScores]) -> WindowScores:
        """The scores of one model on several texts as if they were one."""
        values = {
            measure: torch.cat([part.values[measure] for part in parts])
            for measure in parts[0].values
        }
        return cls(torch.cat([part.losses_WM for part in parts]), values)

    def divergence(self, reference: str) -> Divergence:
        """The comparison with the reference, whose name is `reference`."""
        change_W1 = self.losses_WM[:, 1:] - self.losses_WM[:, :1]
        figures: dict[str, Any] = {
            "reference": reference,
            "reference_perplexity": exponential(mean(self.losses_WM[:, :1]).value),
        }
        for metric in METRICS:
            values = change_W1 if metric.measure is None else self.values[metric.measure]
            figure = metric.summary(values)
            if isinstance(figure, Measured):
                figures[f"{metric.name}_stderr"] = figure.stderr
                figure = figure.value
            figures[metric.name] = figure
        return Divergence(**figures)


def score_windows(
    models: Sequence[LogitsSource],
    ids: torch.Tensor,
    *,
    reference: LogitsSource | None = None,
    batch: int = 1,
    start: int = 0,
    progress: WindowProgress | None = None,
) -> list[WindowScores]:
    """Score all windows by all models side by side, a few rows of logits at a time.

    Several ranks split the windows, and all get all scores.

    The cross entropy is computed in float32, and summed in float64. Logits are kept nowhere: those
    of the reference are there while each model is compared with them.

    Args:
        models: The models to score.
        ids: Token ids (W, S), int64, of all ranks. S is at least 2.
        reference: The model to compare with; None compares with nothing.
        batch: Number of windows in one forward pass.
        start: The first row of a window that is scored. Rows before it are context only.
        progress: Called with the number of windows done, and the number of all windows of this
            rank. A window counts half when one of two models is done with it.

    Returns:
        The scores of each model.

    Raises:
        ValueError: Outputs are not finite, or the vocabularies differ.
    """
    ids_of_rank = own_part(ids, batch)
    sources = [*([] if reference is None else [reference]), *models]
    # What the metrics measure at every token, each once, in a fixed order.
    every = dict.fromkeys(x.measure for x in METRICS if x.measure is not None)
    measures = {} if reference is None else every
    scored = ids.shape[1] - 1 - start
    count = len(ids_of_rank)
    losses_WM = torch.empty(count, len(sources), dtype=torch.float64)
    values = [
        {measure: torch.empty(count, scored, dtype=torch.float64) for measure in measures}
        for _ in models
    ]
    done = [0] * len(sources)

    def report(position: int, windows: int, of: int) -> None:
        done[position] = windows
        if progress is not None:
            progress(sum(done) // len(done), of)

    with contextlib.ExitStack() as stack:
        stack.enter_context(fast_linears())
        windows = [
            stack.enter_context(
                contextlib.closing(
                    source.windows(
                        ids_of_rank, batch, partial(report, position), len(sources) - position
                    )
                )
            )
            for position, source in enumerate(sources)
        ]
        for window, (*rows, ids_S) in enumerate(zip(*windows, ids_of_rank, strict=True)):
            of_window = [{x: of_model[x][window] for x in measures} for of_model in values]
            losses = _score_window(rows, ids_S, window, start, of_window)
            losses_WM[window] = torch.tensor(losses, dtype=torch.float64)
    losses_WM = ranks().all_gather(losses_WM)
    return [
        WindowScores(
            losses_WM[:, [position]] if reference is None else losses_WM[:, [0, position + 1]],
            {measure: ranks().all_gather(values_WT) for measure, values_WT in of_model.items()},
        )
        for position, of_model in enumerate(values)
    ]


def _score_window(
    rows: Sequence[Rows],
    ids_S: torch.Tensor,
    window: int,
    start: int,
    values: Sequence[Mapping[TokenMeasure, torch.Tensor]],
) -> list[float]:
    """Mean losses of all models on one window; what is measured at every token enters `values`.

    Args:
        rows: The logits by the reference, if there is one, and by the models.
        ids_S: The tokens of the window.
        window: Number of the window, for messages.
        start: The first row that is scored.
        values: For each model but the reference: what is measured -> its values for every scored
            token (T,), which are overwritten; empty without a reference.
    """
    totals = [0.0] * len(rows)
    # Row t predicts token t + 1, so the last row of a window predicts nothing and is left out.
    last = len(ids_S) - 1
    for first in range(start, last, ROWS):
        stop = min(first + ROWS, last)
        reference_TV: torch.Tensor | None = None
        for model, of_model in enumerate(rows):
            logits_TV = of_model(first, stop)
            targets_T = ids_S[first + 1 : stop + 1].to(logits_TV.device)
            loss = functional.cross_entropy(logits_TV.float(), targets_T, reduction="sum")
            totals[model] += loss.item()
            if reference_TV is not None:
                part = {x: of[first - start : stop - start] for x, of in values[model - 1].items()}
                _compare(reference_TV.to(logits_TV.device), logits_TV, part)
            elif len(rows) > len(values):
                reference_TV = logits_TV
    for total in totals:
        if not math.isfinite(total):
            raise ValueError(
                f"the loss of window {window} is {total}: the model's outputs are not finite. "
                "Damaged weights, or a dtype too small for this model; try `dtype` float32"
            )
    if not all(values_T.isfinite().all() for of_model in values for values_T in of_model.values()):
        raise ValueError(
            f"the KL divergence of window {window} is not finite: the model gives probability 0 to "
            "a token that the reference can predict"
        )
    return [total / (last - start) for total in totals]


def _compare(
    reference_TV: torch.Tensor,
    model_TV: torch.Tensor,
    values: Mapping[TokenMeasure, torch.Tensor],
) -> None:
    """Overwrite `values` (T,) with what is measured of rows of logits, a few rows at a time."""
    if reference_TV.shape != model_TV.shape:
        raise ValueError(
            f"the reference gives logits for {reference_TV.shape[1]} tokens, the model for "
            f"{model_TV.shape[1]}: give a reference with the same vocabulary"
        )
    for measure, values_T in values.items():
        parts = (each.split(_PIECE) for each in (values_T, reference_TV, model_TV))
        for piece_T, *logits in zip(*parts, strict=True):
            piece_T.copy_(measure(*logits).cpu())
