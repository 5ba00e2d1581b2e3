"""How a model is recovered: options, each declared once. Imports no torch, files or models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from prunus.engine.run_options import BATCH, BOS, BosName
from prunus.options import Option, Options, at_least, between

Mode = Literal["lora", "masked", "full"]

# Headings of --help.
_TRAINING = "Training"
_LORA = "Mode lora"
_POSITIVE = between("(0, inf)")
_COUNT = at_least(1)
# Budget if none is given.
_TOKENS = 131_072
# Tokens of a step if `batch` is not given.
_STEP_TOKENS = 1024

#: Default peak learning rates. A step of Adam moves every weight by about the rate, and models
#: differ tenfold in the size of their weights. So masked and full, which train the weights
#: themselves, have a rate relative to their root mean square. Low-rank factors begin equally in all
#: models, so their rate is plain. On SmolLM2-135M at 50 % (0.26), masked has a rate of 2e-4.
_RATES: dict[Mode, float] = {"lora": 1e-3, "masked": 0.77e-3, "full": 0.77e-3}


class RecoveryOptions(Options):
    """Everything about a recovery that decides the bytes of its result, except its inputs.

    Raises:
        pydantic.ValidationError: A `ValueError`. An option is out of range, or options contradict
            each other.

    >>> [RecoveryOptions(mode="full", seqlen=tokens).batch for tokens in (256, 1000, 2048)]
    [4, 2, 1]
    """

    mode: Annotated[
        Mode,
        Option(
            "Train by lora, masked or full. lora trains low-rank layers of a peft adapter; masked, "
            "all weights but the pruned ones; full, all weights of a model without zeros.",
            metavar="MODE",
            default="masked for a pruned model, full after shrink",
        ),
    ]
    text: Annotated[
        str, Option("Train on this text: a source as for calibration, or a file.", "SOURCE")
    ] = "mix"
    tokens: Annotated[
        int | None,
        Option(
            "Train on N tokens, at least as many as one step takes. A token counts each time that "
            "it is used.",
            metavar="N",
            within=_COUNT,
            default=str(_TOKENS),
        ),
    ] = None
    minutes: Annotated[
        float | None,
        Option("Train for this number of minutes instead.", "MINUTES", within=_POSITIVE),
    ] = None
    seqlen: Annotated[int, Option("Use windows of N tokens.", "N", within=at_least(2))] = 512
    # `_fill_batch` fills it in. The default rates were measured with steps of about 1024 tokens,
    # and smaller steps are noisier.
    batch: Annotated[
        int,
        replace(
            BATCH,
            help="Train on this number of windows per step.",
            panel=_TRAINING,
            default="as many as hold 1024 tokens",
        ),
    ] = Field(None)  # type: ignore[assignment]
    learning_rate: Annotated[
        float | None,
        Option(
            "Use this peak learning rate; it falls along a cosine.",
            metavar="RATE",
            panel=_TRAINING,
            within=_POSITIVE,
            default="that of the mode: 0.001 for lora, 0.00077 times the root mean square of the "
            "weights for masked and full",
        ),
    ] = None
    warmup: Annotated[
        float,
        Option(
            "Raise the rate over this fraction of the budget.", "X", _TRAINING, between("[0, 1)")
        ),
    ] = 0.05
    weight_decay: Annotated[
        float, Option("Use this weight decay of AdamW.", "X", _TRAINING, between("[0, inf)"))
    ] = 0.0
    seed: Annotated[
        int, Option("Order the text and draw low-rank layers by this seed.", "N", _TRAINING)
    ] = 0
    bos: Annotated[BosName, BOS] = "auto"
    held_out: Annotated[
        int,
        Option(
            "Hold out N windows: evaluate them, and never train on them.", "N", _TRAINING, _COUNT
        ),
    ] = 8
    evaluations: Annotated[
        int,
        Option(
            "Evaluate the held-out windows N times, and write a checkpoint each time.",
            "N",
            _TRAINING,
            _COUNT,
        ),
    ] = 8
    distill_weight: Annotated[
        float,
        Option(
            "Give the KL divergence from the teacher the weight X in the loss, and the cross "
            "entropy with the text the weight 1 - X.",
            "X",
            _TRAINING,
            between("(0, 1]"),
        ),
    ] = 1.0
    rank: Annotated[int, Option("Add low-rank layers of rank N.", "N", _LORA, _COUNT)] = 8
    alpha: Annotated[float, Option("Scale the layers by alpha / rank.", "X", _LORA, _POSITIVE)] = (
        16.0
    )
    target_modules: Annotated[
        tuple[str, ...] | None,
        Option(
            "Add layers to the linears with these last parts of their names.",
            metavar="NAME,…",
            panel=_LORA,
            default="q_proj,v_proj",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Option(
            "Compute matrix products in this dtype. Trained parameters are always float32.",
            "DTYPE",
            _TRAINING,
        ),
    ] = "auto"

    @field_validator("target_modules")
    @classmethod
    def _split_lists(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """The names, of which one flag may give several with commas between them."""
        if names is None:
            return None
        return tuple(name.strip() for name in ",".join(names).split(",") if name.strip())

    @model_validator(mode="before")
    @classmethod
    def _fill_batch(cls, values: Any) -> Any:
        """The raw options, with as many windows as hold 1024 tokens if `batch` is left out.

        A bad `seqlen` is refused later, by its own check.
        """
        if not isinstance(values, dict) or "batch" in values:
            return values
        seqlen = values.get("seqlen", cls.model_fields["seqlen"].default)
        is_count = isinstance(seqlen, int) and seqlen >= 1
        return values | {"batch": math.ceil(_STEP_TOKENS / seqlen) if is_count else 1}

    @model_validator(mode="after")
    def _check_combination(self) -> RecoveryOptions:
        if self.tokens is not None and self.minutes is not None:
            raise ValueError("the budget is in tokens or in minutes, not in both")
        step = self.batch * self.seqlen
        if self.tokens is not None and self.tokens < step:
            raise ValueError(
                f"tokens {self.tokens:,} is less than one step, which trains on {step:,} tokens "
                f"({self.batch} windows of {self.seqlen}): give more, or a smaller `batch`"
            )
        for name in ("rank", "alpha", "target_modules"):
            default = type(self).model_fields[name].default
            if self.mode != "lora" and getattr(self, name) != default:
                raise ValueError(f"{name} has no meaning in mode {self.mode}; it belongs to lora")
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                "target_modules names no linear; leave it out, or give names such as q_proj,v_proj"
            )
        return self

    @property
    def budget_tokens(self) -> int | None:
        """The budget in tokens; None if it is in minutes."""
        return _TOKENS if self.tokens is None and self.minutes is None else self.tokens

    def peak_rate(self, weight_rms: float = 1.0) -> float:
        """The peak learning rate: the option, or else the default of the mode.

        Args:
            weight_rms: What the default is relative to, `Trainable.weight_rms`.

        >>> RecoveryOptions(mode="full").peak_rate(weight_rms=0.2)
        0.000154
        >>> RecoveryOptions(mode="masked", learning_rate=1e-4).peak_rate(weight_rms=0.2)
        0.0001
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return _RATES[self.mode] * weight_rms
