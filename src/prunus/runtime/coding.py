"""bfloat16 values in twelve bits without loss: a low byte, and four bits for the high byte.

The high byte of a bfloat16 holds the sign and seven of the eight exponent bits. The weights of a
layer differ in size by a few powers of two, so sixteen high bytes cover nearly all of them. The few
other values are listed with their positions. Coding exponents by how often they occur is the idea
of DFloat11 (arXiv 2504.11651). Codes of a fixed length have the advantage that a look-up in a
register decodes them as fast as memory delivers them.

Values come in groups of 64, and the last group is padded with zeros. One byte holds the codes of
two values that are 32 positions apart, so that a vector register unpacks them with one shift.

Shape suffixes: K values, P values with the last group padded, G groups, R rare values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prunus.runtime.weight import Coding, require

# High bytes that have a code, which four bits number.
_CODES = 16
# Values of a group.
_GROUP = 64
# Values that are encoded at a time.
_PART = _GROUP << 16
# Above this share of rare values, patching them costs a kernel more time than coding saves.
_RARE_SHARE = 1 / 256


def encode(values_K: torch.Tensor) -> tuple[torch.Tensor, Coding] | None:
    """Split bfloat16 values into low bytes, uint8 (P,), and coded high bytes.

    None where that would save no bytes, or where too many rare values make decoding slow.
    """
    assert values_K.dtype == torch.bfloat16
    count = values_K.shape[0]
    occurrences = high_byte_counts(values_K)
    # The sort is stable, so that equal values always give equal files.
    table = occurrences.argsort(descending=True, stable=True)[:_CODES]
    if coded_bytes(occurrences) == 2 * count:
        return None
    whole = padded(count)
    code_of = torch.full((256,), _CODES, dtype=torch.uint8)
    code_of[table] = torch.arange(_CODES, dtype=torch.uint8)
    low_P = torch.empty(whole, dtype=torch.uint8)
    pairs = torch.empty(whole // 2, dtype=torch.uint8)
    rare_at = [torch.empty(0, dtype=torch.int64)]
    rare_values = [torch.empty(0, dtype=torch.uint8)]
    for first, part in _parts(values_K):
        filled = torch.nn.functional.pad(part, (0, padded(part.shape[0]) - part.shape[0]))
        low, high = _bytes(filled).unbind(1)
        codes = code_of[high.int()]
        is_rare = codes == _CODES
        positions = is_rare[: part.shape[0]].nonzero().flatten()
        codes[is_rare] = 0
        codes_G2 = codes.view(-1, 2, _GROUP // 2)
        low_P[first : first + low.shape[0]] = low
        pairs[first // 2 : (first + low.shape[0]) // 2] = (
            codes_G2[:, 0] + (codes_G2[:, 1] << 4)
        ).flatten()
        rare_at.append(positions + first)
        rare_values.append(high[positions])
    return low_P, Coding(pairs, table.to(torch.uint8), torch.cat(rare_at), torch.cat(rare_values))


def high_byte_counts(values_K: torch.Tensor) -> torch.Tensor:
    """Return how often each high byte occurs among bfloat16 values: int64 (256,)."""
    occurrences = torch.zeros(256, dtype=torch.int64)
    for _, part in _parts(values_K):
        occurrences += torch.bincount(_bytes(part)[:, 1].int(), minlength=256)
    return occurrences


def coded_bytes(occurrences: torch.Tensor) -> int:
    """Return the bytes of values with these `high_byte_counts`, coded where `encode` codes them.

    >>> counts = torch.zeros(256, dtype=torch.int64)
    >>> counts[63] = 1024  # all high bytes are the same: 1.5 bytes a value, and the table
    >>> coded_bytes(counts)
    1552
    """
    count = int(occurrences.sum())
    rare = count - int(occurrences.sort(descending=True).values[:_CODES].sum())
    # A rare value takes eight bytes for its position, and one for its high byte.
    coded = padded(count) // 2 * 3 + _CODES + 9 * rare
    return coded if rare <= count * _RARE_SHARE and coded < 2 * count else 2 * count


def _parts(values_K: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield runs of whole groups with their first position; a whole head would take gigabytes."""
    for first in range(0, values_K.shape[0], _PART):
        yield first, values_K[first : first + _PART]


def _bytes(values_K: torch.Tensor) -> torch.Tensor:
    """View bfloat16 values as low and high bytes, uint8 (K, 2)."""
    return values_K.contiguous().view(torch.uint8).view(-1, 2)


def decode(low_P: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Return the bfloat16 values (P,) that `encode` was given, bit for bit, with the padding.

    This is the reference in torch for what the kernels do.

    >>> values = torch.linspace(-2, 2, 2048).bfloat16()
    >>> low, coding = encode(values)
    >>> torch.equal(decode(low, coding)[:2048], values)
    True
    """
    pairs = coding.codes.view(-1, _GROUP // 2)
    codes_P = torch.cat([pairs & 15, pairs >> 4], dim=1).flatten()
    high_P = coding.high_bytes[codes_P.int()]
    values = torch.stack([low_P, high_P], dim=1)
    values[coding.rare_at, 1] = coding.rare
    return values.flatten().view(torch.bfloat16)


def padded(count: int) -> int:
    """Return the number of low bytes of `count` values: `count` rounded up to whole groups of 64.

    >>> padded(65)
    128
    """
    return -(-count // _GROUP) * _GROUP


def check_coding(low_P: torch.Tensor, count: int, coding: Coding) -> None:
    """Check that the parts of `count` coded values fit each other.

    Raises:
        ValueError: They do not; the message says what is wrong.
    """
    codes, high_bytes, rare_at, rare = coding
    whole = padded(count)
    of_all = f"of {count:,} coded values"
    require(f"low bytes {of_all}", low_P, torch.uint8, whole)
    require(f"codes {of_all}", codes, torch.uint8, whole // 2)
    require(f"high bytes {of_all}", high_bytes, torch.uint8, _CODES)
    require(f"places of rare values {of_all}", rare_at, torch.int64, rare_at.numel())
    require(f"rare values {of_all}", rare, torch.uint8, rare_at.numel())
    inside = (rare_at >= 0) & (rare_at < count)
    if not bool(inside.all()) or not bool((rare_at.diff() > 0).all()):
        raise ValueError(f"the places of rare values must ascend within {count:,} coded values")
