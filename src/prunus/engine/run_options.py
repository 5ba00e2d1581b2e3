"""The options that every run has: where its windows come from, and how the work is done.

Imports no torch, so that a recipe can be read without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from prunus.calibration.catalogue import CHOICES
from prunus.options import ADVANCED, Option, Options, at_least
from prunus.words import parse_bytes

#: Heading of the options on calibration in --help.
CALIBRATION = "Calibration"

#: The values of the option `dtype`.
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
#: The values of the option `bos`.
BosName = Literal["auto", "yes", "no"]

# Options that other commands have as well.
BOS = Option(
    "Begin every window with the BOS token, in place of its first token. auto: if the tokenizer "
    "puts one before a text. no: as in the papers.",
    metavar="BOS",
    panel=CALIBRATION,
    is_condition=True,
)
DTYPE = Option(
    "Compute in this dtype: auto, float32, bfloat16 or float16. The result keeps the dtype of the "
    "checkpoint.",
    metavar="DTYPE",
    panel=ADVANCED,
    is_condition=True,
)
BATCH = Option(
    "Run this number of windows per forward pass.",
    metavar="N",
    panel=CALIBRATION,
    within=at_least(1, " window"),
    default="as many as hold about 4096 tokens",
    is_condition=True,
)


#: A number of bytes, or text such as "8GB".
MemorySize = Annotated[
    int | None, BeforeValidator(lambda x: parse_bytes(x) if isinstance(x, str) else x)
]


#: What a recipe calls windows that the caller gives in place of the name of a source.
GIVEN = ("texts", "pixel values", "token ids")


class WindowOptions(Options):
    """The calibration windows of a run, and the dtype in which they are computed.

    Attributes:
        calibration: The source of the windows: a name, a file or a folder, or what the caller gives
            in words, such as "token ids".
        samples: The number of windows.
        seqlen: Tokens per window. Images have no such length and ignore it.
        seed: Seed of the random choice of windows.
        bos: Whether every window begins with the BOS token.
        batch: Windows per forward pass; None lets `windows_per_batch` choose.
        dtype: The dtype of the forward passes; "auto" lets `decide_dtype` choose.
    """

    calibration: Annotated[
        str,
        Option(
            f"Calibrate on {CHOICES}. Image classifiers take a folder of images.",
            metavar="SOURCE",
            is_condition=True,
        ),
    ] = "mix"
    samples: Annotated[
        int,
        Option(
            "Calibrate on N windows.",
            metavar="N",
            within=at_least(1, ": a run needs calibration windows"),
            is_condition=True,
        ),
    ] = 1024
    seqlen: Annotated[
        int,
        Option(
            "Use windows of N tokens.",
            metavar="N",
            within=at_least(2, " tokens"),
            is_condition=True,
        ),
    ] = 256
    seed: Annotated[
        int,
        Option(
            "Choose the windows at random by this seed.",
            metavar="N",
            panel=CALIBRATION,
            is_condition=True,
        ),
    ] = 0
    bos: Annotated[BosName, BOS] = "auto"
    batch: Annotated[int | None, BATCH] = None
    dtype: Annotated[DtypeName, DTYPE] = "auto"


class RunOptions(Options):
    """How the work is done, as far as it does not decide the bytes of the result.

    Attributes:
        device: auto, cpu, cuda or cuda:i.
        memory: Memory budget of the whole process in bytes, on the host and on the device alike;
            None for the free memory.
        data: Folder with local copies of the calibration datasets; None downloads them.
        overwrite: Whether to replace an earlier result in the output folder.
        resume: True insists on an unfinished run to continue, False refuses one; None continues it
            if the options are the same.
        trust_remote_code: Whether transformers may run code that comes with the checkpoint.
        measure_error: Whether the relative output error is measured for every method, also for one
            that reads no Gram matrix. The weights of the result are the same.
        rank_timeout: A process without a sign of life counts as lost after this many seconds; None
            for the default.
        tokenizer: The model's tokenizer or image processor; None loads it from the checkpoint.
        calibration_data: Calibration data instead of a named source: token ids (samples, seqlen),
            pixel values (samples, channels, height, width), or texts, rows of a data set or chats;
            see `prunus.calibration.sources`.
        own_method: A `prunus.methods.Method` in place of the name of one.
        own_allocation: A function that gives every linear a sparsity; see `allocate`.
        own_masks: Masks in place of the path of some: full name -> bool (out, in).
    """

    device: Annotated[str, Option("Run on cpu, cuda, cuda:0, ….", metavar="DEVICE")] = "auto"
    memory: Annotated[
        MemorySize,
        Option(
            "Use at most SIZE of memory, such as 8GB. This limits host and device.",
            metavar="SIZE",
            default="the free memory",
        ),
    ] = None
    data: Annotated[
        Path | None,
        Option(
            "Read datasets in DIR or $PRUNUS_DATA.",
            metavar="DIR",
            default="download them",
        ),
    ] = None
    overwrite: Annotated[bool, Option("Replace an earlier result of prunus in OUT.")] = False
    resume: Annotated[
        bool | None,
        Option(
            "Insist on resuming an unfinished run, or refuse to.",
            switch="--resume/--no-resume",
            panel=ADVANCED,
            default="resume if the options are the same",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool,
        Option(
            "Run the model code of the checkpoint. It runs with all your rights.", panel=ADVANCED
        ),
    ] = False
    measure_error: Annotated[
        bool,
        Option(
            "Measure the relative output error of every method. This takes the time and memory of "
            "Gram matrices, and changes no weight.",
            panel=ADVANCED,
        ),
    ] = False
    rank_timeout: Annotated[
        float | None,
        Option(
            "Stop when a process of torchrun is late by this many seconds.",
            metavar="SECONDS",
            panel=ADVANCED,
            default="600",
        ),
    ] = None
    tokenizer: Annotated[
        Any,
        Option(
            "Use this tokenizer or image processor.", flag=False, default="that of the checkpoint"
        ),
    ] = None
    calibration_data: Any = None
    own_method: Any = None
    own_allocation: Any = None
    own_masks: Any = None
