"""How a model is to be recovered: validated and frozen; knows nothing of torch, files or models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["MODES", "Mode", "RecoveryOptions", "recovery_options"]

Mode = Literal["lora", "sparse-lora", "masked", "block"]
MODES: tuple[Mode, ...] = ("lora", "sparse-lora", "masked", "block")

DEFAULT_TOKENS = 131_072
#: Peak learning rates. A step of Adam moves every weight by about the rate, and models differ tenfold in the size of
#: theirs, so where weights themselves are trained it is in units of that. Low-rank factors begin alike in all models.
#: On SmolLM2-135M at 50 %, of size 0.26, `masked` comes to 3e-4, with steps of 1024 tokens; see docs/log.md.
_RATES: dict[Mode, float] = {"lora": 1e-3, "sparse-lora": 1e-3, "masked": 1.15e-3, "block": 1.2e-3}
#: Options that mean something in some modes only.
_BELONGS: dict[str, tuple[Mode, ...]] = {
    "rank": ("lora", "sparse-lora"),
    "alpha": ("lora", "sparse-lora"),
    "targets": ("lora", "sparse-lora"),
    "weight_decay": ("lora", "sparse-lora", "masked"),
    "warmup": ("lora", "sparse-lora", "masked"),
    "evaluations": ("lora", "sparse-lora", "masked"),
    "patience": ("lora", "sparse-lora", "masked"),
    "distill_weight": ("lora", "sparse-lora", "masked"),
    "passes": ("block",),
}


class RecoveryOptions(BaseModel):
    """Everything about a recovery that decides the bytes of its result, beside the checkpoints and the machine.

    Attributes:
        mode: what is trained; see `prunus.recovery`.
        text: source of the training text, as for calibration.
        tokens, minutes: the budget; one of them. Tokens are counted as often as they are trained on.
        seqlen: tokens per window.
        batch: windows per step of the optimiser.
        learning_rate: at its peak; None is the mode's own.
        warmup: share of the budget over which the rate rises.
        weight_decay: AdamW's, per step and unit of learning rate.
        seed: of the order of the text and of fresh low-rank factors.
        held_out: windows that are never trained on, to judge by.
        evaluations: how often the held-out windows are scored over the budget, each time with a checkpoint.
        patience: evaluations without a new best after which training stops.
        distill_weight: of the divergence from the teacher's logits, with 1 - distill_weight for the text itself.
        rank, alpha: of low-rank updates, which are scaled by alpha / rank.
        targets: last parts of the names of the linears that get one; None: query and value projections for lora,
            every pruned linear for sparse-lora.
        passes: of block matching over its windows.
        dtype: of matrix products and activations: auto, float32 or bfloat16. What is trained is float32.
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
    held_out: int = Field(8, ge=1)
    evaluations: int = Field(8, ge=1)
    patience: int = Field(3, ge=1)
    distill_weight: float = Field(1.0, gt=0, le=1)
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    targets: tuple[str, ...] | None = None
    passes: int = Field(3, ge=1)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> RecoveryOptions:
        if self.tokens is not None and self.minutes is not None:
            raise ValueError("the budget is in tokens or in minutes, not in both")
        for name, modes in _BELONGS.items():
            if (
                self.mode not in modes
                and getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ValueError(
                    f"{name} means nothing in mode {self.mode}; it belongs to {', '.join(modes)}"
                )
        if self.targets is not None and not self.targets:
            raise ValueError(
                "targets names no linear; leave it out, or give names such as q_proj,v_proj"
            )
        return self

    @property
    def budget_tokens(self) -> int | None:
        """The budget in tokens; None where it is in minutes."""
        return (
            self.tokens if self.tokens is not None or self.minutes is not None else DEFAULT_TOKENS
        )

    def peak_rate(self, size: float = 1.0) -> float:
        """The learning rate at its peak; the mode's own may go by the weights' `size`, see `supports.kept_size`."""
        return self.learning_rate if self.learning_rate is not None else _RATES[self.mode] * size


def recovery_options(values: dict[str, Any]) -> RecoveryOptions:
    """Options from keyword arguments; None stands for the default.

    Raises:
        ValueError: an unknown option, a value out of range, options that do not go together.
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
