"""Everything that is checked and decided before a recovery does any work.

What can fail later for a reason that is known now fails here, before anything is written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.calibration.sources import find_source
from prunus.calibration.training_text import TrainingText, training_text
from prunus.calibration.windows import WindowRequest, check_context
from prunus.distributed import ranks
from prunus.engine.run_options import RunOptions
from prunus.model.checkpoint.files import file_digest, read_card
from prunus.model.checkpoint.output_folder import check_companions
from prunus.model.checkpoint.resolve import open_folder
from prunus.model.device import choose_device
from prunus.model.kinds import require_causal
from prunus.model.open_folder import ADAPTER_CONFIG, OpenFolder
from prunus.model.skeleton import Skeleton
from prunus.model.source import CheckpointSource, OpenModel, bound_skeleton
from prunus.model.tokenizer import Vocabulary, check_same_vocabulary, load_tokenizer
from prunus.pruning.manifest import Manifest
from prunus.recovery.learner import products_dtype
from prunus.recovery.recovery_options import Mode, RecoveryOptions
from prunus.recovery.recovery_record import RecoveryInputs
from prunus.structure.structure_record import StructureRecord
from prunus.words import require_library

# Bytes per trained parameter in memory: the float32 weight, its gradient and Adam's two moments. On
# the disk are the weight, the moments and the best weight.
_STATE_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan(OpenModel):
    """A checkpoint that is trained, with the decisions of the training.

    Attributes:
        recipe: How the model is trained.
        teacher: The dense checkpoint; None if there is no teacher.
        dtype: The dtype of matrix products and activations.
        dtype_reason: Why it is that dtype, in words.
        data: Folder with local copies of datasets, or None.
        card: The README.md of the checkpoint; None if it has none.
    """

    source: CheckpointSource
    recipe: RecoveryOptions
    teacher: CheckpointSource | None
    dtype: torch.dtype
    dtype_reason: str
    data: Path | None
    card: str | None

    @property
    def state_bytes(self) -> int:
        """Bytes of the training of all weights, in memory and on the disk; 0 for an adapter."""
        if self.recipe.mode == "lora":
            return 0
        return _STATE_BYTES * self.stored_bytes // self.source.stored_dtype.itemsize

    def disk_bytes(self) -> int:
        """Bytes of the result, with the state of the training. An adapter's are few."""
        return self.state_bytes + (0 if self.recipe.mode == "lora" else self.stored_bytes)

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values. These need a word:

        - `text`, `seqlen`, `batch`: what is trained on, tokens of a window, windows per step;
        - `minutes`, `tokens`: the budget, of which one is None;
        - `memory_bytes`: the model in training and its teacher, without activations.
        """
        dense = None if self.teacher is None else self.teacher.checkpoint
        names = {"mode", "text", "seqlen", "batch", "minutes", "tokens", "bos"}
        return self.recipe.model_dump(include=names) | {
            "blocks": len(self.skeleton),
            "dtype": str(self.dtype).removeprefix("torch."),
            "dtype_reason": self.dtype_reason,
            "device": str(self.device),
            "teacher": None if dense is None else str(dense.folder),
            "memory_bytes": (self.state_bytes or self.stored_bytes)
            + (dense.nbytes(dense.tensors) if dense else 0),
            "disk_bytes": self.disk_bytes(),
        }

    def check_unchanged(self) -> None:
        """Raise an error that names the file unless both models are what they were at first."""
        for source in (self.source, self.teacher):
            if source is not None:
                source.check_unchanged()


def default_mode(model: str | Path | OpenFolder) -> Mode:
    """The mode that follows from how a checkpoint was made.

    Raises:
        ValueError: None follows, because the checkpoint has no record of prunus.
        FileNotFoundError: There is no such checkpoint.
    """
    folder = _folder_of(model, unpacks=False).path
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
    model: str | Path | OpenFolder,
    recipe: RecoveryOptions,
    options: RunOptions,
    teacher: str | Path | OpenFolder | None,
) -> RecoveryPlan:
    """Check all that needs neither weights nor text, and decide what is left open.

    Args:
        model: Folder or hub id of the checkpoint to train, or its open folder.
        recipe: How it is trained.
        options: How the work is done.
        teacher: The dense model in the same way, or None.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, NotImplementedError, ModuleNotFoundError,
        OSError: The message says what was given, what is wrong and what to do.
    """
    check_ranks(recipe)
    if recipe.mode == "lora":
        require_library("peft", "an adapter", "adapters")
    find_source(recipe.text).check(
        WindowRequest(seqlen=recipe.seqlen, bos=recipe.bos, data=options.data)
    )
    folder = _folder_of(model, unpacks=False)
    if recipe.mode != "lora":  # an adapter copies nothing
        check_companions(folder.path)
    card = read_card(folder.path / "README.md")
    device = choose_device(options.device)
    source, skeleton = _open(folder)
    dense = None
    if teacher is not None:
        dense, _ = _open(_folder_of(teacher, unpacks=True))
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
    dtype, reason = products_dtype(recipe.dtype, device)
    return RecoveryPlan(
        name=str(model),
        source=source,
        skeleton=skeleton,
        device=device,
        recipe=recipe,
        teacher=dense,
        dtype=dtype,
        dtype_reason=reason,
        data=options.data,
        card=card,
    )


def recovery_inputs(plan: RecoveryPlan) -> tuple[RecoveryInputs, TrainingText]:
    """What the result depends on beside the recipe, and the windows of the text.

    All bytes of the weights are read, to hash them.
    """
    text = draw_training_text(plan)
    inputs = RecoveryInputs(
        checkpoint=full_fingerprint(plan.source),
        teacher=full_fingerprint(plan.teacher) if plan.teacher is not None else None,
        text=text.source,
        text_sha256=_text_sha256(plan.recipe.text, text),
        dtype=str(plan.dtype).removeprefix("torch."),
        dtype_reason=plan.dtype_reason,
        device=plan.device.type,
        bos=text.bos,
    )
    return inputs, text


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


def _open(folder: OpenFolder) -> tuple[CheckpointSource, Skeleton]:
    """A checkpoint of a causal LM, bound to the skeleton of its model."""
    source = CheckpointSource(folder)
    require_causal(source.config, "prunus recover")
    return source, bound_skeleton(source)


def full_fingerprint(source: CheckpointSource) -> str:
    """SHA-256 over the configuration and all bytes of the weights, which it reads."""
    digest = hashlib.sha256(source.fingerprint.encode())
    for name, tensor in source.checkpoint.read(sorted(source.checkpoint.tensors)):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def draw_training_text(plan: RecoveryPlan) -> TrainingText:
    """The windows of the text, which fit the model; its tokenizer cuts the text.

    Raises:
        ValueError, FileNotFoundError, ModuleNotFoundError, OSError: As `training_text`. ValueError
            too if the windows are longer than the context of the model.
    """
    recipe, folder = plan.recipe, plan.source.folder
    config = plan.source.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    check_context(positions if isinstance(positions, int) else None, recipe.seqlen)

    request = WindowRequest(
        seqlen=recipe.seqlen,
        seed=recipe.seed,
        bos=recipe.bos,
        data=plan.data,
        tokenizer=lambda: load_tokenizer(folder),
        vocabulary=config.vocab_size,
    )
    return training_text(recipe.text, request, recipe.held_out)


def _text_sha256(source: str, text: TrainingText) -> str:
    """The hash of the text: of its first windows, and of the whole file if it is one."""
    if not Path(source).is_file():
        return text.sha256
    return hashlib.sha256(f"{text.sha256} {file_digest(Path(source))}".encode()).hexdigest()


def _folder_of(model: str | Path | OpenFolder, *, unpacks: bool) -> OpenFolder:
    """The folder of a checkpoint.

    Args:
        model: Folder or hub id.
        unpacks: Whether it may also be a GGUF file or an MLX folder, of which it is then a dense
            copy.

    Raises:
        ValueError: It is a GGUF file or an MLX folder, or an adapter.
        FileNotFoundError: There is no such checkpoint.
    """
    folder = open_folder(model, unpacks=unpacks)
    if folder.format is not None:
        raise ValueError(
            f"{model} is compressed, and recover takes dense and pruned models: give the one that "
            "it was made from, and compress the result"
        )
    if folder.is_adapter:
        raise ValueError(
            f"{folder.path} is an adapter ({ADAPTER_CONFIG}), not a checkpoint; "
            "give the model that it is for"
        )
    return folder


def _vocabulary(source: CheckpointSource, role: str = "") -> Vocabulary:
    """The tokens of a model, which `role` begins to name in errors."""
    folder = source.folder
    return Vocabulary(f"{role}{folder.path}", source.config.get_text_config().vocab_size, folder)
