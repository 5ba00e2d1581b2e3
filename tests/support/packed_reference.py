"""Slow and obvious versions of the bitmap format, and pruned models to pack."""

from pathlib import Path
from typing import Any

import torch
from prunus.runtime.weight import PackedWeight

from tiny import tiny_model


def bitmap(weight: torch.Tensor) -> tuple[list[list[int]], list[float]]:
    """Mask bytes per row and surviving values of a small weight, one entry after another."""
    rows, values = [], []
    for row in weight.tolist():
        taken = [0] * ((len(row) + 7) // 8)
        for column, entry in enumerate(row):
            if entry != 0:
                taken[column // 8] |= 1 << (column % 8)
                values.append(entry)
        rows.append(taken)
    return rows, values


def random_sparse(
    rows: int, columns: int, density: float, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    """A weight whose first row is empty and whose last is full, where there are more than two."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(rows, columns, generator=generator) < density
    if rows > 2:
        keep[0], keep[-1] = False, True
    return torch.where(keep, torch.randn(rows, columns, generator=generator), torch.tensor(0.0)).to(
        dtype
    )


def levels_of(packed: PackedWeight) -> torch.Tensor:
    """The int8 values of a weight in their places, as float32 (O, I)."""
    rows, columns = packed.shape
    keep = torch.ones(rows, columns, dtype=torch.bool)
    if packed.mask is not None:
        bits = (packed.mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        keep = bits.reshape(rows, -1)[:, :columns].bool()
    whole = torch.zeros(rows, columns)
    whole[keep] = packed.values.float()
    return whole


def with_all_exponents(weight: torch.Tensor) -> torch.Tensor:
    """The weight with one entry in five hundred replaced by one of another size, from 2^-126 to
    2^120.
    """
    weight = weight.clone()
    kept = weight.view(-1).nonzero().flatten()[::500]
    exponents = torch.linspace(-126, 120, len(kept)).round()
    weight.view(-1)[kept] = torch.ldexp(torch.tensor(1.5), exponents).to(weight.dtype)
    return weight


def coded(values: torch.Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Low bytes, codes, high bytes, places of rare values and these of bfloat16 values, one value
    after another.
    """
    words = [word & 0xFFFF for word in values.view(torch.int16).tolist()]
    count = {high: sum(word >> 8 == high for word in words) for high in range(256)}
    table = sorted(range(256), key=lambda high: (-count[high], high))[:16]
    groups = -(-len(words) // 64)
    low, codes, rare_at, rare = [0] * (64 * groups), [0] * (32 * groups), [], []
    # What fills up the last group is a zero, whose high byte has a code only if one of the values
    # has it.
    for number, word in enumerate(words + [0] * (64 * groups - len(words))):
        group, place = divmod(number, 64)
        low[number] = word & 255
        code = table.index(word >> 8) if word >> 8 in table else 0
        codes[32 * group + place % 32] |= code << (4 * (place // 32))
        if word >> 8 not in table and number < len(words):
            rare_at.append(number)
            rare.append(word >> 8)
    return low, codes, table, rare_at, rare


def prune_in_place(model: Any, sparsity: float = 0.5) -> Any:
    """Zero the smallest entries of every row of every matrix inside the blocks."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inside = any(part in name for part in (".layers.", ".h.", ".blocks."))
            if inside and parameter.dim() == 2:
                count = int(parameter.shape[1] * sparsity)
                smallest = parameter.float().abs().argsort(dim=1)[:, :count]
                parameter.scatter_(1, smallest, 0)
    return model


def pruned_checkpoint(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    sparsity: float = 0.5,
    **options: Any,
) -> Path:
    prune_in_place(tiny_model(family, dtype, **options), sparsity).save_pretrained(folder)
    return folder


def decoded(
    model: Any, ids: torch.Tensor, steps: int = 12, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of fixed tokens, one at a time, after a prompt: (windows, steps, vocabulary)."""
    with torch.no_grad():
        mask = torch.ones_like(ids) if mask is None else mask
        cache, found = model(ids, attention_mask=mask, use_cache=True).past_key_values, []
        for token in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
            next_ids = torch.full((len(ids), 1), 3 + token)
            out = model(next_ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.stack(found, dim=1)
