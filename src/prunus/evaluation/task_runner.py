"""Models on tasks of lm-eval and folders of images: checked before weights are read, and scored.

Each task is scored by itself. Its score does not depend on the other tasks of the call.

Legend: N images, K labels.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.calibration.corpora import data_folder
from prunus.calibration.images import ImageFolder, list_images, read_images
from prunus.distributed import SINGLE_PROCESS, Ranks
from prunus.evaluation.model_input import (
    ComputeOptions,
    ModelInput,
    check_as_loaded,
    file_states,
    find_folder,
    find_model,
    unchanged,
)
from prunus.evaluation.options import ImageOptions, TaskOptions
from prunus.evaluation.records import Metric, TaskResults, TaskScore
from prunus.evaluation.tasks import LoadedTask, load_tasks, require_lm_eval, run_task, wrap_model
from prunus.model.config import load_config
from prunus.model.device import choose_device
from prunus.model.kinds import IMAGES, kind_of
from prunus.model.tokenizer import load_image_processor
from prunus.options import takes
from prunus.runs.progress import Shown, shows_progress

#: Sequences at once for batch "auto" on a CPU, where no device memory limits the batch.
_CPU_BATCH = 8
#: Images per forward pass for batch "auto".
_IMAGES_AT_ONCE = 16


@takes(TaskOptions)
@shows_progress("evaluate", lambda line: Shown(None, line))
def evaluate(
    model_or_path: Any,
    tasks: str | Sequence[str] = "paper7",
    *,
    progress: Callable[[str], None] | bool | None = True,
    **options: Any,
) -> TaskResults:
    """Accuracy of a causal language model on tasks of lm-eval.

    Args:
        model_or_path: a folder (dense, packed, or an adapter), a hub id, or a loaded transformers
            model. A loaded model is evaluated on its device and in its dtype, with the tokenizer of
            its `name_or_path`.
        tasks: a list of names, or one string with commas. Names are tasks, tags and groups of
            lm-eval, or `paper7` for the Wanda paper's boolq, rte, hellaswag, winogrande, arc_easy,
            arc_challenge and openbookqa.
        progress: True shows a bar on a terminal or in a notebook, and nothing elsewhere. A function
            is called with a line of text after every task.
        **options: see `TaskOptions`. The folder `data` contains the rows in `zeroshot/`.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
    """
    run = prepare_tasks([model_or_path], tasks, **options)
    return run.run(progress if callable(progress) else None)[0]


@dataclass(frozen=True)
class TaskRun:
    """Models with their tokenizers, and tasks with their rows. `prepare_tasks` checks them."""

    models: tuple[tuple[ModelInput, Any], ...]
    tasks: tuple[LoadedTask, ...]
    batch: int | str
    options: ComputeOptions

    def run(
        self, progress: Callable[[str], None] | None = None, ranks: Ranks = SINGLE_PROCESS
    ) -> list[TaskResults]:
        """Evaluate one model after the other. Ranks split the rows, each with the whole model.

        On rank 0, `progress` is called with a line of text after every task.
        """
        choose_device(str(self.options.device), processes=ranks.local_size)
        results = []
        for model, tokenizer in self.models:
            scores: list[TaskScore] = []
            ranks.set_location(f"loading {model.name}")
            with unchanged(file_states(model.folder), ranks):
                with ranks.fail_together():
                    folder = model.folder
                    loaded = model.loaded if folder is None else self.options.load(folder)
                    wrapped = wrap_model(loaded, tokenizer, self.batch, ranks)
                for task in self.tasks:
                    ranks.set_location(f"{task.name} of {model.name}")
                    found = run_task(task, wrapped)
                    # lm-eval returns the scores on rank 0 alone.
                    sent = ranks.on_rank_0(partial(list, [asdict(score) for score in found]))
                    found = found or [TaskScore(**score) for score in sent]
                    if progress is not None and ranks.rank == 0:
                        progress(f"{model.name}: {task.name} done in {found[0].seconds:.0f} s")
                    scores += found
            # Free this model's memory before the next one is loaded.
            del wrapped, loaded
            gc.collect()
            protocol = self.options.protocol(self.batch, model.loaded)
            protocol["versions"] |= {"lm_eval": version("lm_eval")}
            results.append(TaskResults(model.name, tuple(scores), protocol))
        return results


def prepare_tasks(
    models: Sequence[Any], tasks: str | Sequence[str] = "paper7", **options: Any
) -> TaskRun:
    """Check models and tasks before any work; see `evaluate` for arguments and errors."""
    require_lm_eval()
    given = TaskOptions.read(None, options)
    for model in models:
        check_as_loaded(model, given.dtype, given.device)
    loaded = next((model for model in models if isinstance(model, nn.Module)), None)
    place = choose_device(given.device, loaded)
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name.strip() for name in names if name.strip()]
    checked = []
    for model in [find_model(model, given.trust_remote_code) for model in models]:
        tokenizer, size = model.tokenizer(given.tokenizer), model.vocabulary
        # Special tokens that were added past the end of the embedding may never occur.
        if size is not None and tokenizer.vocab_size > size:
            raise ValueError(
                f"{model.name}: its tokenizer has {tokenizer.vocab_size} tokens, the model a "
                f"vocabulary of {size}; the tokenizer does not fit, is it another model's?"
            )
        checked.append((model, tokenizer))
    return TaskRun(
        models=tuple(checked),
        tasks=tuple(load_tasks(names, given.fewshot, given.limit, data_folder(given.data))),
        batch=_CPU_BATCH if given.batch == "auto" and place.type == "cpu" else given.batch,
        options=ComputeOptions(given.dtype, place, trust_remote_code=given.trust_remote_code),
    )


# --- images ---


def image_accuracy(
    models: Sequence[str | Path],
    folder: Path,
    *,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> list[TaskResults]:
    """Top-1 accuracy of image classifiers. Each model's own image processor prepares the images.

    The name of a subfolder is its label, if the model's `label2id` has the names of all subfolders.
    Otherwise there must be as many subfolders as labels, and the position in sorted order is the
    label, as for ImageNet's folders.

    Args:
        **options: see `ImageOptions`.

    Returns:
        For each model one score, with the metric `accuracy`. Its standard error for n images is
        that of a binomial share p, √(p (1 − p) / n).

    Raises:
        ValueError, FileNotFoundError, NotImplementedError, ModuleNotFoundError, OSError: Before any
            work where possible; says what was given, what is wrong and what to do.
    """
    given = ImageOptions.read(None, options)
    compute = ComputeOptions(
        given.dtype, choose_device(given.device), trust_remote_code=given.trust_remote_code
    )
    images = list_images(Path(folder))
    if not images.classes:
        raise ValueError(
            f"{folder} has no class folders: accuracy needs a subfolder of images per class"
        )
    count = len(images.paths)
    chosen: Sequence[int] = range(count)
    if given.limit is not None and given.limit < count:
        # Images are sorted by class. The first ones would all be of the same class.
        chosen = [step * count // given.limit for step in range(given.limit)]
    size = _IMAGES_AT_ONCE if given.batch == "auto" else given.batch
    batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    # All models are checked before the first is loaded.
    checked = []
    for model in models:
        found = find_folder(model)
        config = load_config(found, given.trust_remote_code)
        if (kind := kind_of(config)) is not IMAGES:
            raise NotImplementedError(f"{model} is a {kind.name}; images are for image classifiers")
        checked.append((str(model), found, *_labels(images, config)))
    results = []
    for name, found, labels, how in checked:
        started, correct = time.perf_counter(), []
        with unchanged(file_states(found)), torch.no_grad():
            processor = load_image_processor(found, given.trust_remote_code)
            model = compute.load(found)
            for places in batches:
                pixels = read_images([images.paths[i] for i in places], processor)
                pixels = pixels.to(compute.device, model.dtype)
                logits_NK = model(pixel_values=pixels).logits.float()
                if not bool(torch.isfinite(logits_NK).all()):
                    raise ValueError(
                        f"{name}: the model gives logits that are not finite; try `dtype` float32"
                    )
                expected = torch.tensor([labels[images.labels[i]] for i in places])
                correct += (logits_NK.argmax(dim=1).cpu() == expected).double().tolist()
                if progress is not None:
                    progress(f"{name}: {len(correct)} of {len(chosen)} images")
        share = sum(correct) / len(correct)
        error = math.sqrt(share * (1 - share) / len(correct))
        score = TaskScore(
            task=str(folder),
            metrics={"accuracy": Metric(share, error, tuple(correct))},
            shots=0,
            rows=len(correct),
            version="",
            definition="",
            source=how,
            seconds=round(time.perf_counter() - started, 2),
        )
        results.append(TaskResults(name, (score,), compute.protocol(size) | {"labels": how}))
    return results


def _labels(images: ImageFolder, config: Any) -> tuple[list[int], str]:
    """The model's label of every class folder, and how it was found."""
    by_name = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    if all(name in by_name for name in images.classes):
        labels = [by_name[name] for name in images.classes]
        return labels, "folders by name, through the model's label2id"
    if len(images.classes) == config.num_labels:
        return list(range(config.num_labels)), "folders by sorted order"
    unknown = next(name for name in images.classes if name not in by_name)
    raise ValueError(
        f"{images.folder} has {len(images.classes)} class folders, the model {config.num_labels} "
        f"labels, and {unknown!r} is none of these ({', '.join(list(by_name)[:3])}, …): name the "
        "folders as the labels, or give all of them"
    )
