"""How a model is recovered: validated and frozen. This file knows no torch, files or models."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["MODES", "Mode", "RecoveryOptions", "recovery_options"]

Mode = Literal["lora", "masked", "full", "scales"]
MODES: tuple[Mode, ...] = ("lora", "masked", "full", "scales")

DEFAULT_TOKENS = 131_072
_STEP_TOKENS = 1024

#: Default peak learning rates. A step of Adam moves every weight by about the rate, and models
#: differ tenfold in the size of their weights. So masked and full, which train the weights
#: themselves, have a rate relative to their root mean square. Low-rank factors begin alike in all
#: models, so their rate is plain. On SmolLM2-135M at 50 % (0.26), masked comes to 2e-4. Mode scales
#: trains logarithms, whose steps are relative changes in all models.
_RATES: dict[Mode, float] = {
    "lora": 1e-3,
    "masked": 0.77e-3,
    "full": 0.77e-3,
    "scales": 2e-3,
}

#: Options that have a meaning in some modes only.
_MODES_OF_OPTION: dict[str, tuple[Mode, ...]] = {
    "rank": ("lora",),
    "alpha": ("lora",),
    "target_modules": ("lora",),
}


class RecoveryOptions(BaseModel):
    """Everything about a recovery that decides the bytes of its result, except its inputs.

    Attributes:
        mode: what is trained; see `prunus.recovery`.
        text: source of the training text, as for calibration.
        tokens, minutes: the budget; one of the two. A token counts each time it is trained on.
        seqlen: tokens per window.
        batch: windows per step of the optimizer. Without one, as many as hold 1024 tokens: the
            default rates were measured with such steps, and smaller ones are noisier.
        learning_rate: peak rate; None for the default of the mode.
        warmup: fraction of the budget over which the rate rises.
        weight_decay: of AdamW, per step and unit of learning rate.
        seed: of the order of the text and of fresh low-rank factors.
        bos: whether every window begins with the BOS token. auto: if the tokenizer puts one before
            a text.
        held_out: number of windows that are only evaluated, never trained on.
        evaluations: how often the held-out windows are evaluated over the budget. Each evaluation
            writes a checkpoint.
        patience: training stops after this many evaluations that are no better than an earlier one
            of the same training.
        distill_weight: of the KL divergence from the teacher's logits. The cross entropy with the
            text has the weight 1 - distill_weight.
        rank, alpha: of the low-rank layers, which are scaled by alpha / rank.
        target_modules: last parts of the names of the linears that get a layer. None stands for
            the query and value projections.
        dtype: of matrix products and activations: auto, float32 or bfloat16. Trained parameters are
            always float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode
    text: str = "c4"
    tokens: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    seqlen: int = Field(512, ge=2)
    batch: int = Field(1, ge=1)
    learning_rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    seed: int = 0
    bos: Literal["auto", "yes", "no"] = "auto"
    held_out: int = Field(8, ge=1)
    evaluations: int = Field(8, ge=1)
    patience: int = Field(3, ge=1)
    distill_weight: float = Field(1.0, gt=0, le=1)
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    target_modules: tuple[str, ...] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _fill_step(cls, given: Any) -> Any:
        """Give a step of the default size its number of windows."""
        if not isinstance(given, dict) or "batch" in given:
            return given
        seqlen = given.get("seqlen", cls.model_fields["seqlen"].default)
        if not isinstance(seqlen, int) or seqlen < 1:
            return given
        return given | {"batch": math.ceil(_STEP_TOKENS / seqlen)}

    @model_validator(mode="after")
    def _check_combination(self) -> RecoveryOptions:
        if self.tokens is not None and self.minutes is not None:
            raise ValueError("the budget is in tokens or in minutes, not in both")
        for name, modes in _MODES_OF_OPTION.items():
            default = type(self).model_fields[name].default
            if self.mode not in modes and getattr(self, name) != default:
                raise ValueError(
                    f"{name} has no meaning in mode {self.mode}; it belongs to {', '.join(modes)}"
                )
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                "target_modules names no linear; leave it out, or give names such as q_proj,v_proj"
            )
        return self

    @property
    def budget_tokens(self) -> int | None:
        """The budget in tokens; None if it is in minutes."""
        return (
            self.tokens if self.tokens is not None or self.minutes is not None else DEFAULT_TOKENS
        )

    def peak_rate(self, weight_rms: float = 1.0) -> float:
        """Return the peak learning rate.

        Args:
            weight_rms: what a default rate is relative to; see `Trainable.weight_rms`.

        Example:
            >>> RecoveryOptions(mode="full").peak_rate(weight_rms=0.2)
            0.000154
            >>> RecoveryOptions(mode="masked", learning_rate=1e-4).peak_rate(weight_rms=0.2)
            0.0001
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return _RATES[self.mode] * weight_rms


def recovery_options(values: dict[str, Any]) -> RecoveryOptions:
    """Return options from keyword arguments; None stands for the default.

    Raises:
        ValueError: an option is unknown or out of range, or options contradict each other.

    Example:
        >>> recovery_options({"mode": "lora", "rank": None}).rank
        8
        >>> [recovery_options({"mode": "full", "seqlen": n}).batch for n in (256, 1000, 2048)]
        [4, 2, 1]
    """
    try:
        return RecoveryOptions(
            **{name: value for name, value in values.items() if value is not None}
        )
    except ValidationError as fault:
        raise ValueError("; ".join(_explain(error) for error in fault.errors())) from None


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown option {name!r}; known are {', '.join(RecoveryOptions.model_fields)}"
    if error["type"] == "missing":
        return f"{name} is missing; give one of {', '.join(MODES)}"
    if error["type"] == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {error['msg'].lower()} (got {error['input']!r})"
