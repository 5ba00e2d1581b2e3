"""Options of evaluation, each declared once. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import field_validator, model_validator

from prunus.engine.run_options import BATCH, BOS, DTYPE, BosName, DtypeName, MemorySize, RunOptions
from prunus.options import ADVANCED, Option, Options, Range, at_least, between

#: Which tokens of a window are scored. `papers`: all but the first. `llama.cpp`: those of the
#: second half, as its perplexity tool does.
Protocol = Literal["papers", "llama.cpp"]
#: Protocol -> tokens per window if the user does not choose.
PROTOCOLS: dict[Protocol, int] = {"papers": 2048, "llama.cpp": 512}


def _option(name: str) -> Any:
    """The declaration of an option that runs of blocks have too."""
    return RunOptions.declared()[name]


class _EvaluationOptions(Options):
    """How models are computed, whatever they are scored on.

    Raises:
        pydantic.ValidationError: A `ValueError`. An option is out of range.
    """

    FILE = "evaluation"

    batch: Annotated[
        int | Literal["auto"],
        replace(
            BATCH,
            help="Compute this number of windows or prompts per forward pass.",
            metavar="N|auto",
            panel=ADVANCED,
            within=None,  # `_read_batch` checks it, because it may be text
            default="auto, which is 1 window, or 8 prompts (on a GPU as many as fit)",
        ),
    ] = "auto"
    dtype: Annotated[
        DtypeName,
        replace(
            DTYPE, help="Compute in this dtype: auto (as stored), float32, bfloat16 or float16."
        ),
    ] = "auto"
    device: Annotated[str, _option("device")] = "auto"
    data: Annotated[Path | None, _option("data")] = None
    trust_remote_code: Annotated[bool, _option("trust_remote_code")] = False
    tokenizer: Annotated[Any, _option("tokenizer")] = None

    @field_validator("batch", mode="before")
    @classmethod
    def _read_batch(cls, value: Any) -> Any:
        """A batch as "auto" or a number, from Python or from the text of a command line."""
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if number != "auto" and (not isinstance(number, int) or number < 1):
            raise ValueError(f"batch must be 'auto' or at least 1; got {value!r}")
        return number


class TextOptions(_EvaluationOptions):
    """How models are scored on a text.

    >>> TextOptions(batch="4").batch
    4
    """

    seqlen: Annotated[
        int | None,
        Option(
            "Score windows of N tokens.",
            metavar="N",
            within=at_least(2, " tokens"),
            default="2048, or 512 with protocol llama.cpp",
        ),
    ] = None
    samples: Annotated[
        int | None,
        Option(
            "Score only the first N windows.",
            metavar="N",
            within=at_least(1, " window"),
            default="all",
        ),
    ] = None
    protocol: Annotated[
        Protocol,
        Option(
            "Score all tokens of a window but the first (papers), or those of its second half, as "
            "the perplexity tool of llama.cpp does (llama.cpp).",
            metavar="PROTOCOL",
            panel=ADVANCED,
        ),
    ] = "papers"
    bos: Annotated[BosName, replace(BOS, panel=ADVANCED)] = "auto"
    stream: Annotated[
        bool | None,
        Option(
            "For perplexity, load one block at a time, or load the whole model. The figures are "
            "the same.",
            switch="--stream/--no-stream",
            panel=ADVANCED,
            default="stream what does not fit in memory, the reference included",
        ),
    ] = None
    memory: Annotated[MemorySize, _option("memory")] = None


class TaskOptions(_EvaluationOptions):
    """How models are scored on tasks."""

    limit: Annotated[
        int | None,
        Option(
            "Score only the first N rows of each task.",
            metavar="N",
            within=at_least(1),
            default="all",
        ),
    ] = None
    fewshot: Annotated[
        int | None,
        Option(
            "Put this number of solved examples before each question of a task.",
            metavar="N",
            panel=ADVANCED,
            within=at_least(0, " examples"),
            default="as the task says, mostly 0",
        ),
    ] = None
    include_path: Annotated[
        Path | None,
        Option(
            "Take tasks also from the YAML files of this folder, as lm-eval's --include_path does.",
            metavar="DIR",
            panel=ADVANCED,
            default="only lm-eval's own tasks",
        ),
    ] = None


class WritingOptions(Options):
    """How a model writes text, where it is not as the checkpoint says.

    None leaves the choice to the checkpoint's own settings.
    """

    FILE = "generate"

    max_new_tokens: Annotated[
        int,
        Option(
            "Write at most this number of tokens.",
            metavar="N",
            within=at_least(1),
            aliases=("--max-tokens", "-n"),
        ),
    ] = 128
    temperature: Annotated[
        float | None,
        Option(
            "Draw tokens with this temperature; 0 always takes the most likely token.",
            metavar="T",
            within=between("[0, inf)"),
            default="as the checkpoint says",
        ),
    ] = None
    top_p: Annotated[
        float | None,
        Option(
            "Draw only among the most likely tokens that have this probability together.",
            metavar="P",
            within=between("(0, 1]"),
            default="as the checkpoint says",
        ),
    ] = None
    seed: Annotated[
        int | None,
        Option(
            "Draw tokens by this seed.",
            metavar="N",
            within=Range(lambda value: 0 <= value < 2**63, "be from 0 to 2^63 - 1"),
            default="another one each time",
        ),
    ] = None

    @model_validator(mode="after")
    def _draws_or_not(self) -> Self:
        if self.temperature == 0 and self.top_p is not None:
            raise ValueError(
                f"temperature 0 takes the most likely token, and top_p {self.top_p} draws among "
                "several: leave one of them out"
            )
        return self
