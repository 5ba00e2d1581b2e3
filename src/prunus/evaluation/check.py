"""`compress --check`: how far a result is from the dense model, measured at the end of its run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunus.distributed import on_rank_0
from prunus.engine.linear_plan import LinearPlan
from prunus.engine.result import Result
from prunus.engine.run_options import RunOptions
from prunus.engine.session import Session
from prunus.evaluation.perplexity import load_scoring_text, perplexities
from prunus.formats.codec import codec_for
from prunus.formats.gguf.file import open_gguf
from prunus.model.checkpoint.files import read_card, read_json, write_text
from prunus.model.device import choose_device
from prunus.rounding.cards import checked_card
from prunus.rounding.compression_recipe import CompressionRecipe
from prunus.rounding.compression_record import CHECKED, CompressionRecord

#: What is scored: prose and code. No calibration reads these parts of both texts.
TEXTS = ("wikitext2", "python-code")
# How much of each, in windows as long as those of the calibration: enough for a standard error of
# some percent, and little beside a calibration of the default length.
_TOKENS = 8192


def prepared_check(
    model: str, output: Path, recipe: CompressionRecipe, options: RunOptions, session: Session
) -> Callable[[CompressionRecord, Session, LinearPlan | None], None]:
    """What scores the result of a run at its end, for `after` of `run_verb`.

    Both texts are read now, so that a run does not end without them.

    Args:
        model: The dense model.
        output: The result.
        recipe: The recipe of the run.
        options: The options of the run.
        session: Who hears that the texts are read.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: A text is not at hand.
    """
    result = codec_for(output, recipe).RESULT(output, CompressionRecord)
    session.tell(f"reading {' and '.join(TEXTS)}, on which the result is scored in the end")
    for text in TEXTS:
        load_scoring_text(text, options.data)
    scoring = options.model_dump(include={"data", "device", "memory", "trust_remote_code"})
    scoring |= {"seqlen": recipe.seqlen, "samples": max(2, _TOKENS // recipe.seqlen)}
    return functools.partial(_check, result, model, scoring)


def _check(
    result: Result[CompressionRecord],
    model: str,
    scoring: dict[str, Any],
    record: CompressionRecord,
    session: Session,
    plan: LinearPlan | None,
) -> None:
    """Score a result, and enter the figures into its record, its file and its card."""
    if record.check:
        return
    what, device = f"scoring the result beside {model}", choose_device(scoring["device"])
    count, before = session.preparing(what, 100 * len(TEXTS), device), 0

    def report(done: int, total: int) -> None:
        """Count each text in percent, as far as this rank has scored its windows."""
        nonlocal before
        percent = 100 * done // total
        count(percent - before if percent >= before else percent)
        before = percent

    dense = model if plan is None else plan.checkpoint.folder
    [results] = perplexities([str(result.path)], TEXTS, reference=dense, progress=report, **scoring)
    path = result.path
    architecture = (
        open_gguf(path).architecture
        if path.is_file()
        else str(read_json(path / "config.json").get("model_type")).removesuffix("_text")
    )
    for text, scored in zip(TEXTS, results, strict=False):  # the last one is over both
        assert scored.divergence is not None
        figures = scored.divergence.as_dict() | {"windows": scored.windows, "seqlen": scored.seqlen}
        record.check[text] = {name: figures[name] for name in CHECKED}
        record.check[text]["architecture"] = architecture

    def enter() -> None:
        """Enter the figures into the card and the record of the finished result."""
        write_text(result.card, checked_card(read_card(result.card), record, result.path.name))
        result.store_record(record)

    on_rank_0(enter)
