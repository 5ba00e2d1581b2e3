"""Everything that is checked and decided before a recovery does any work.

What can fail later for a reason that is known now fails here, before anything is written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from prunus.calibration.sources import find_source
from prunus.calibration.training_text import TrainingText, training_text
from prunus.calibration.windows import WindowRequest, check_context
from prunus.distributed import ranks
from prunus.engine.folder import resumed_or_new
from prunus.engine.run_options import RunOptions
from prunus.hardware.errors import require_library
from prunus.model.adapter import CONFIG_NAME, is_adapter
from prunus.model.checkpoint.atomic_files import file_digest
from prunus.model.checkpoint.output_folder import check_companions
from prunus.model.checkpoint.regular_files import read_card
from prunus.model.checkpoint.resolve import resolve_folder
from prunus.model.config import read_config
from prunus.model.device import choose_device
from prunus.model.formats import reader_of
from prunus.model.kinds import require_causal
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource
from prunus.model.tokenizer import Vocabulary, check_same_vocabulary, load_tokenizer
from prunus.pruning.manifest import Manifest
from prunus.recovery.recovery_options import Mode, RecoveryOptions
from prunus.recovery.recovery_record import RecoveryInputs, RecoveryRecord
from prunus.recovery.training import training_dtype
from prunus.structure.structure_record import StructureRecord


@dataclass(frozen=True)
class RecoveryPlan:
    """A checked recovery."""

    #: The model as the caller named it.
    model: str | Path
    #: The checkpoint to train.
    source: CheckpointSource
    #: The model without weights, to which `source` is bound.
    skeleton: Skeleton
    #: The dense checkpoint; None if there is no teacher.
    teacher: CheckpointSource | None
    #: The windows to train on, and the held-out windows.
    text: TrainingText
    #: Where the training runs.
    device: torch.device
    #: The dtype of matrix products and activations.
    dtype: torch.dtype
    #: A new record, or that of the unfinished or finished run in the folder of the result.
    record: RecoveryRecord
    #: The README.md of the checkpoint; None if it has none.
    card: str | None

    @property
    def recipe(self) -> RecoveryOptions:
        """How the model is trained."""
        return self.record.recipe

    def check_unchanged(self) -> None:
        """Raise an error that names the file unless both models are what the record says."""
        for source in (self.source, self.teacher):
            if source is not None:
                source.check_unchanged()


def default_mode(model: str | Path) -> Mode:
    """The mode that follows from how a checkpoint was made.

    Raises:
        ValueError: None follows, because the checkpoint has no record of prunus.
        FileNotFoundError: There is no such checkpoint.
    """
    folder = _folder_of(model, unpacks=False)
    if (folder / Manifest.FILE).exists():  # a smaller model may be pruned too
        return "masked"
    if (folder / StructureRecord.FILE).exists():
        return "full"
    raise ValueError(
        f"{folder} has no record of prunus prune or shrink, so no mode follows from it: "
        "give `mode` masked for a model with pruned weights, full for one without, or lora for an "
        "adapter"
    )


def plan_recovery(
    model: str | Path,
    recipe: RecoveryOptions,
    options: RunOptions,
    teacher: str | Path | None,
    earlier: RecoveryRecord | None,
    name: str | None = None,
) -> RecoveryPlan:
    """Check all that can be checked, and decide what is left open. Nothing is written.

    Args:
        model: Folder or hub id of the checkpoint to train.
        recipe: How it is trained.
        options: How the work is done.
        teacher: Folder or hub id of the dense model, or None.
        earlier: The record of the run that is resumed or finished; None for a new run.
        name: What the record calls the model; None for `model`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, ModuleNotFoundError,
        OSError: The message says what was given, what is wrong and what to do.
    """
    if recipe.mode == "lora":
        require_library("peft", "an adapter", "adapters")
    find_source(recipe.text).check(
        WindowRequest(seqlen=recipe.seqlen, bos=recipe.bos, data=options.data)
    )
    folder = _folder_of(model, unpacks=False)
    if recipe.mode != "lora":  # an adapter copies nothing
        check_companions(folder)
    card = read_card(folder / "README.md")
    device = choose_device(options.device)
    source, skeleton = _open(folder)
    dense = None
    if teacher is not None:
        dense = open_teacher(teacher)
        check_same_vocabulary(
            _vocabulary(dense, "the teacher "),
            _vocabulary(source),
            "give a teacher with the same vocabulary",
        )
    elif recipe.distill_weight != 1:
        raise ValueError(
            f"distill_weight {recipe.distill_weight} weighs a teacher, and there is none: "
            "give the dense model as `teacher`"
        )
    dtype, reason = training_dtype(recipe.dtype, device)
    text = draw_training_text(recipe, source, options.data)
    inputs = RecoveryInputs(
        checkpoint=full_fingerprint(source),
        teacher=full_fingerprint(dense) if dense is not None else None,
        text=text.source,
        text_sha256=_text_sha256(recipe.text, text),
        dtype=str(dtype).removeprefix("torch."),
        dtype_reason=reason,
        device=device.type,
        bos=text.bos,
    )
    names = {"source": name or str(model), "teacher": str(teacher) if teacher is not None else None}
    record = resumed_or_new(RecoveryRecord, earlier, recipe, inputs, device, **names)
    return RecoveryPlan(model, source, skeleton, dense, text, device, dtype, record, card)


def check_ranks(recipe: RecoveryOptions) -> None:
    """Check that several processes can split this training.

    Raises:
        ValueError: A step has fewer windows than there are processes, or the budget is in minutes.
    """
    size = ranks().size
    if size == 1:
        return
    if recipe.batch < size:
        raise ValueError(
            f"`batch` {recipe.batch} cannot be split over {size} ranks: raise it to {size} or more"
        )
    if recipe.minutes is not None:
        raise ValueError(
            f"{recipe.minutes:g} minutes would end at a different step on each of {size} "
            "ranks, because their clocks differ: give the budget in `tokens`"
        )


def open_teacher(model: str | Path) -> CheckpointSource:
    """The checkpoint of a dense causal LM, which can teach.

    Raises:
        ValueError: It is compressed, or an adapter.
        FileNotFoundError, NotImplementedError: There is no checkpoint, or it is no causal LM.
    """
    return _open(_folder_of(model, unpacks=True))[0]


def _open(folder: Path) -> tuple[CheckpointSource, Skeleton]:
    """A checkpoint of a causal LM, bound to the skeleton of its model."""
    source = CheckpointSource(folder)
    require_causal(source.config, "prunus recover")
    skeleton = Skeleton(source.config, source.stored_dtype)
    source.bind(skeleton)
    return source, skeleton


def full_fingerprint(source: CheckpointSource) -> str:
    """SHA-256 over the configuration and all bytes of the weights, which it reads."""
    digest = hashlib.sha256(source.fingerprint.encode())
    for name, tensor in source.checkpoint.read(sorted(source.checkpoint.tensors)):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def draw_training_text(
    recipe: RecoveryOptions,
    source: CheckpointSource,
    data: Path | None,
) -> TrainingText:
    """The windows of the text, which fit the model.

    Args:
        recipe: The source of the text, its windows and the budget.
        source: The checkpoint in training, whose tokenizer cuts the text.
        data: Folder with local copies of datasets, or None.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: As `training_text`. ValueError
            too if the windows are longer than the context of the model.
    """
    config = source.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    check_context(positions if isinstance(positions, int) else None, recipe.seqlen)

    request = WindowRequest(
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        bos=recipe.bos,
        data=data,
        tokenizer=lambda: load_tokenizer(source.checkpoint.folder),
        vocabulary=config.vocab_size,
    )
    return training_text(recipe.text, request, recipe.held_out)


def _text_sha256(source: str, text: TrainingText) -> str:
    """The hash of the text: of its first windows, and of the whole file if it is one."""
    if not Path(source).is_file():
        return text.sha256
    return hashlib.sha256(f"{text.sha256} {file_digest(Path(source))}".encode()).hexdigest()


def _folder_of(model: str | Path, *, unpacks: bool) -> Path:
    """The folder of a dense or pruned checkpoint.

    Args:
        model: Folder or hub id.
        unpacks: Whether it may also be a GGUF file or an MLX folder, of which it is then a dense
            copy.

    Raises:
        ValueError: It is compressed, or an adapter.
        FileNotFoundError: There is no such checkpoint.
    """
    if unpacks or reader_of(model) is None:
        folder = resolve_folder(model)
        if is_adapter(folder):
            raise ValueError(
                f"{folder} is an adapter ({CONFIG_NAME}), not a checkpoint; "
                "give the model that it is for"
            )
        config = folder / "config.json"
        if not config.is_file() or not read_config(config).get("quantization_config"):
            return folder
    raise ValueError(
        f"{model} is compressed, and recover takes dense and pruned models: give the one that it "
        "was made from, and compress the result"
    )


def _vocabulary(source: CheckpointSource, role: str = "") -> Vocabulary:
    """The tokens of a model, which `role` begins to name in errors."""
    folder = source.checkpoint.folder
    return Vocabulary(f"{role}{folder}", source.config.get_text_config().vocab_size, folder)
