"""Checkpoints in few bits, read as the dense checkpoints that they stand for.

Programs that quantise a model store a weight in parts: small integers or floats (its codes), scales
for runs or blocks of them, and for some the code that stands for 0 (its zero points):

    weight[o, i] = (code[o, i] − zero[x(o), y(i)]) · scale[x(o), y(i)]

`DenseCheckpoint` shows such a folder under the names, shapes and dtypes of the dense weights, so
nothing behind it knows. A weight is expanded when it is read, with the arithmetic of the format's
own program: rounded to the dtype of its scales, then to that of the result. All that can be wrong
is found when the folder is opened, for which headers and scales are read.

Outline: `Coded` is a weight in memory, and `StoredParts` looks up its parts in a checkpoint. A
layout is a function from `StoredParts` to a `Weight`, which says how one weight is read. `METHODS`
has the layouts of each method.

Shape suffixes: O outputs, I inputs, X and Y rows and columns of the scales, N rows, K bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from prunus.model.checkpoint.quantization_config import (
    GPTQ_V2_PACKINGS,
    OF_BLOCKS,
    Rules,
    block_of,
    check_fields,
    method_of,
    rules_of,
    unpack,
)
from prunus.model.checkpoint.tensor_files import VALUES, Checkpoint, TensorInfo

#: The values of FP4 (E2M1) by code.
FP4_BY_CODE = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The dtypes of weights of a byte, of scales, and of shapes and numbers of groups.
_BYTES = (*_FP8, torch.int8)
_SCALES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8,
    torch.float8_e8m0fnu,
)  # fmt: skip
_INDICES = (torch.int64, torch.int32)
#: What activations are quantised with; no weight needs it.
_OF_ACTIVATIONS = re.compile(
    r"\.(input|output|activation|[qkv])(_global)?_(scale|zero_point)(_inv|_ub)?$"
)
#: The place of each column in a word of AWQ with 4 bits, as its kernels want them.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]
_STEP = 2**22  # weights that are multiplied at a time, in float32

#: The bits of the codes that are read, of the methods that have no other kinds.
_BITS = {"gptq": (2, 4, 8), "awq": (4, 8)}


def from_stream(data_NK: Tensor, bits: int) -> Tensor:
    """The integers in a stream of bits, uint8: one after the other from low to high bits.

    Args:
        data_NK: uint8, rows of a multiple of `bits` bytes.
        bits: The bits of an integer, at most 8.

    >>> from_stream(torch.tensor([[0b10_001_000, 0b1_100_011_0, 0b111_110_10]]).byte(), 3).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    eights_NWK = functional.pad(data_NK.unflatten(1, (-1, bits)), (0, 8 - bits))
    words_NW = eights_NWK.view(torch.int64)[..., 0]
    eights = [(words_NW >> bits * index & 2**bits - 1).to(torch.uint8) for index in range(8)]
    return torch.stack(eights, dim=2).flatten(1)


def _from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` integers of each row of int32 or uint8, uint8 (N, count)."""
    data_NK = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return from_stream(functional.pad(data_NK, (0, -data_NK.shape[1] % bits)), bits)[:, :count]


def _as_floats(scale: Tensor) -> Tensor:
    """Scales in a dtype that torch computes in: uint8 are exponents of 2 (E8M0)."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
    return scale if scale.dtype.itemsize > 1 else scale.float()


class Coded(NamedTuple):
    """A weight in memory as codes with scales; see the top of this file.

    Attributes:
        codes_OI: Integers, or floats of 8 bits.
        scale_XY: The scales.
        zero_XY: The zero points; None for 0.
        block: The rows and columns that share a scale.
        index_I: The column of `scale_XY` for each input; None for runs.
        values: The value of each code; None for the codes themselves.
    """

    codes_OI: Tensor
    scale_XY: Tensor
    zero_XY: Tensor | None
    block: tuple[int, int]
    index_I: Tensor | None = None
    values: tuple[float, ...] | None = None

    def write(self, weight_OI: Tensor) -> None:
        """Write the dense weight into a tensor, a few rows at a time."""
        outputs, inputs = self.codes_OI.shape
        scale_XY, row_O = _as_floats(self.scale_XY), torch.arange(outputs) // self.block[0]
        index_I = self.index_I
        index_I = torch.arange(inputs) // self.block[1] if index_I is None else index_I.long()
        step = max(1, _STEP // inputs)
        for first in range(0, outputs, step):
            part = slice(first, first + step)
            numbers_OI = self.codes_OI[part].float()
            if self.values is not None:
                numbers_OI = torch.tensor(self.values)[self.codes_OI[part].int()]
            if self.zero_XY is not None:
                numbers_OI -= self.zero_XY.float()[row_O[part]][:, index_I]
            numbers_OI *= scale_XY[row_O[part]][:, index_I]
            weight_OI[part] = numbers_OI.to(scale_XY.dtype)


class Weight(NamedTuple):
    """How a dense weight is stored, and read.

    Attributes:
        name: Its name in the dense checkpoint.
        parts: Role of a part -> its stored name.
        shape: The shape of the dense weight. If it has three axes, the first counts matrices.
        coded: From the parts of one matrix, by role, to its codes.
        transposed: Whether the codes of a matrix are its transpose.
    """

    name: str
    parts: Mapping[str, str]
    shape: tuple[int, ...]
    coded: Callable[[dict[str, Tensor]], Coded]
    transposed: bool = False

    def read(self, checkpoint: Checkpoint, dtype: torch.dtype, pinned: bool) -> Tensor:
        """The dense weight, in memory of its own."""
        parts = {role: checkpoint.whole(name) for role, name in self.parts.items()}
        dense = torch.empty(self.shape, dtype=dtype, pin_memory=pinned)
        if dense.dim() == 2:
            return self._expand(parts, dense)
        for index, matrix in enumerate(dense):
            self._expand({role: tensor[index] for role, tensor in parts.items()}, matrix)
        return dense

    def read_first_matrix(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Tensor:
        """The first matrix of a dense weight with three axes; no part is read whole."""
        parts = {role: checkpoint.first_matrix(name) for role, name in self.parts.items()}
        return self._expand(parts, torch.empty(self.shape[1:], dtype=dtype))

    def _expand(self, parts: dict[str, Tensor], matrix: Tensor) -> Tensor:
        """Write one dense matrix, and return it."""
        self.coded(parts).write(matrix.T if self.transposed else matrix)
        return matrix


class StoredParts:
    """The parts of one weight in a checkpoint, which are checked when they are asked for.

    Args:
        checkpoint: The files.
        stem: What the names of all parts begin with.
        described: The entry quantization_config of config.json.
        rules: What that says of a module alone, by its name; see `rules_of`.

    Attributes:
        module: The name of the module that has the weight.
        rules: What is said of this module.
        described: As given, with the fields of the first rule in the place of its own.
        parts: Role of a part, which ends its name -> its name, of the parts that were asked for.
    """

    def __init__(
        self, checkpoint: Checkpoint, stem: str, described: Mapping[str, Any], rules: Rules
    ) -> None:
        self.checkpoint, self.stem = checkpoint, stem
        self.module = stem.removesuffix("weight").removesuffix(".")
        self.rules = rules(self.module)
        # compressed-tensors describes the weights of a group, and the others change some fields.
        changed = self.rules[0] if self.rules and "config_groups" not in described else {}
        self.described = {**described, **{x: y for x, y in changed.items() if y is not None}}
        self.parts: dict[str, str] = {}

    def refuse(self, role: str, wrong: str) -> NoReturn:
        """Raise a ValueError that names a part and says what is wrong."""
        raise ValueError(
            f"{self.checkpoint.folder}: {(self.stem + role).rstrip('.')} {wrong}; the tensors and "
            f"the quantization_config of config.json ({self.described['quant_method']}) do not "
            "belong together. Download or copy the checkpoint again"
        )

    def has(self, role: str) -> bool:
        """Whether there is such a part."""
        return self.stem + role in self.checkpoint.tensors

    def part(
        self,
        role: str,
        *shapes: tuple[int, ...],
        axes: int | None = None,
        dtypes: Collection[torch.dtype] = (torch.int32,),
    ) -> TensorInfo:
        """What the header says of a part.

        Args:
            role: The end of its name.
            shapes: The shapes that it may have; none for all.
            axes: The number of axes that it must have; None for any.
            dtypes: The dtypes that it may have.
        """
        if not self.has(role):
            self.refuse(role, "is missing")
        self.parts[role] = self.stem + role
        info = self.checkpoint.tensors[self.stem + role]
        if axes not in (None, len(info.shape)) or 0 in info.shape:
            self.refuse(role, f"has shape {info.shape}, which no such part has")
        if shapes and info.shape not in shapes:
            self.refuse(role, f"has shape {info.shape}, and {shapes[0]} fits the other parts")
        if info.dtype not in dtypes:
            self.refuse(role, f"is stored in {info.dtype}, and such a part in {(*dtypes,)[0]}")
        return info

    def scale(self, role: str, *shapes: tuple[int, ...]) -> TensorInfo:
        """`part` for scales, of which none may be 0 or no finite number."""
        info = self.part(role, *shapes, dtypes=_SCALES)
        numbers = _as_floats(self.checkpoint.whole(self.parts[role])).float()
        if not bool(torch.isfinite(numbers).all()) or bool((numbers == 0).any()):
            self.refuse(role, "holds a scale that is 0 or no finite number")
        return info

    def group(self, inputs: int, groups: int) -> tuple[int, int]:
        """The block of a weight in GPTQ or AWQ. The last group is shorter if they do not fit.

        Without a group_size it is 128, as in the programs that run these weights.
        """
        size = self.described.get("group_size", 128)
        wide = min(size, inputs) if isinstance(size, int) and size > 0 else inputs
        if groups != (expected := -(-inputs // wide)):
            self.refuse("", f"has {groups} groups, and group_size {size} makes {expected}")
        return 1, wide

    def index(
        self, role: str, shape: tuple[int, ...], wide: int, field: str, has_order: bool | None
    ) -> None:
        """Check the part that numbers the group of each input.

        Args:
            role: The part, which may be missing.
            shape: The shape of the weight.
            wide: The inputs of a group.
            field: The field that says whether the groups have another order than the inputs.
            has_order: Whether it says so; None if it says nothing.
        """
        groups = -(-shape[-1] // wide)
        if not self.has(role):
            if has_order and groups > 1:
                self.refuse(role, f"is missing, and {field} says that the groups have an order")
            return
        self.part(role, (*shape[:-2], shape[-1]), dtypes=_INDICES)
        index_I = self.checkpoint.whole(self.parts[role])
        if int(index_I.min()) < 0 or int(index_I.max()) >= groups:
            self.refuse(role, f"has a group beyond the {groups} that have scales")
        if has_order is False and bool((index_I != torch.arange(shape[-1]) // wide).any()):
            self.refuse(role, f"gives the groups an order, and {field} says that they have none")

    def zeros(
        self,
        role: str,
        field: str,
        is_symmetric: bool | None,
        zeros: Callable[[Tensor], Tensor] = Tensor.float,
        middle: int = 0,
    ) -> None:
        """Check zero points.

        Args:
            role: The part that they are in, which may be missing.
            field: The field that says whether the weight is symmetric.
            is_symmetric: Whether it says so; None if it says nothing.
            zeros: From the part to the zero points.
            middle: The zero point of all symmetric weights.
        """
        if is_symmetric is False and not self.has(role):
            self.refuse(role, f"is missing, and {field} says that there are zero points")
        name = self.stem + role
        if is_symmetric and self.has(role) and (zeros(self.checkpoint.whole(name)) != middle).any():
            self.refuse(role, f"holds zero points other than {middle}, and {field} allows none")

    def kinds(self, role: str, kind: str, bits: int | None = None) -> list[dict[str, Any]]:
        """How compressed-tensors may describe this weight.

        Args:
            role: The part with the codes.
            kind: What these are, "int" or "float".
            bits: Their bits; None for any.
        """
        found = [x for x in self.rules if x.get("type") == kind]
        if bits is not None:
            found = [x for x in found if x.get("num_bits") == bits]
        if not found:
            shown = f"{bits} bits of type {kind}" if bits else f"the type {kind}"
            self.refuse(role, f"has codes of {shown}, which config.json does not describe")
        return found

    def grid(
        self, role: str, shape: tuple[int, ...], kinds: Iterable[Mapping[str, Any]]
    ) -> tuple[tuple[int, int], Mapping[str, Any]]:
        """The block that shares a scale, and the first description that the scales fit.

        Args:
            role: The part with the scales.
            shape: The shape of the weight.
            kinds: Descriptions, in the words of compressed-tensors.
        """
        forms: dict[tuple[int, ...], tuple[tuple[int, int], Mapping[str, Any]]] = {}
        for kind in kinds:
            strategy, block = block_of(kind, shape)
            if [type(x) for x in block] != [int, int] or min(block) < 1:
                self.refuse(role, f"has blocks of {block!r}, which are no two numbers")
            block = min(block[0], shape[-2]), min(block[1], shape[-1])
            forms.setdefault((*shape[:-2], *_rows_and_columns(shape, block)), (block, kind))
            flat = {"channel": [shape[:1]], "tensor": [(), (1,)]}.get(strategy, [])
            for form in flat if len(shape) == 2 else ():
                forms.setdefault(form, (block, kind))
        if (found := self.part(role, dtypes=_SCALES).shape) not in forms:
            form, (_, kind) = next(iter(forms.items()))
            fields = " ".join(f"{x} {kind[x]}" for x in OF_BLOCKS if kind.get(x) is not None)
            self.refuse(role, f"has shape {found}, and {form} fits the other parts and {fields}")
        self.scale(role)
        return forms[found]


def _gptq(stored: StoredParts) -> Weight:
    """GPTQ: columns of 32-bit words. Version 1 of the format stores each zero point less 1."""
    form = stored.described.get("checkpoint_format", stored.described.get("format", "gptq"))
    if stored.described.get("packing_format") in GPTQ_V2_PACKINGS:
        form = "gptq_v2"
    if form not in ("gptq", "gptq_v2"):
        stored.refuse("qweight", f"is stored in the format {form!r}, and prunus reads gptq")
    words, outputs = stored.part("qweight", axes=2).shape
    groups, bits = _bits(stored, outputs)
    inputs = 32 * words // bits
    stored.scale("scales", (groups, outputs))
    block = stored.group(inputs, groups)
    shape, has_order = (outputs, inputs), stored.described.get("desc_act")
    stored.index("g_idx", shape, block[1], "desc_act", has_order)
    # GPTQModel has subtracted from whole words, so the sum undoes what a zero point has borrowed.
    ones = 0 if form == "gptq_v2" else sum(1 << place for place in range(0, 32, bits))

    def zeros(qzeros: Tensor) -> Tensor:
        return _from_words(qzeros + ones, bits, outputs).T

    def coded(parts: dict[str, Tensor]) -> Coded:
        codes_OI, zero_XY = _from_words(parts["qweight"].T, bits, inputs), zeros(parts["qzeros"])
        return Coded(codes_OI, parts["scales"].T, zero_XY, block, parts.get("g_idx"))

    stored.zeros("qzeros", "sym", stored.described.get("sym"), zeros, 2 ** (bits - 1))
    return Weight(f"{stored.stem}weight", stored.parts, shape, coded)


def _awq(stored: StoredParts) -> Weight:
    """AWQ: rows of 32-bit words. The columns of a word have an order of their own in 4 bits."""
    version = str(stored.described.get("version", stored.described.get("format", "gemm"))).lower()
    if version != "gemm":
        stored.refuse("qweight", f"is stored in the version {version!r}, and prunus reads gemm")
    inputs, words = stored.part("qweight", axes=2).shape
    outputs = stored.part("scales", axes=2, dtypes=_SCALES).shape[1]
    groups, bits = _bits(stored, outputs)
    stored.part("qzeros", (groups, words))
    stored.scale("scales", (groups, outputs))
    block, order = stored.group(inputs, groups), _AWQ_ORDER if bits == 4 else [0]

    def columns(packed: Tensor) -> Tensor:
        codes = _from_words(packed, bits, outputs).unflatten(1, (-1, len(order)))
        return codes[..., order].flatten(1).T

    def coded(parts: dict[str, Tensor]) -> Coded:
        zero_XY = columns(parts["qzeros"])
        return Coded(columns(parts["qweight"]), parts["scales"].T, zero_XY, block)

    is_symmetric = not stored.described.get("zero_point", not stored.described.get("sym"))
    stored.zeros("qzeros", "zero_point or sym", is_symmetric, columns, 2 ** (bits - 1))
    return Weight(f"{stored.stem}weight", stored.parts, (outputs, inputs), coded)


def _bits(stored: StoredParts, outputs: int) -> tuple[int, int]:
    """The groups and the bits of the codes of GPTQ or AWQ, by the shape of the zero points."""
    method, described = stored.described["quant_method"], stored.described.get("bits")
    known, kind = _BITS[method], str(stored.described.get("data_type", "int"))
    if described not in known or "int" not in kind or "fp" in kind:
        where = f"{stored.checkpoint.folder}: {stored.module}"
        what = f"{method} in {described} bits" + (f" of {kind}" if kind != "int" else "")
        raise ValueError(_unread(where, method, what))
    groups, words = stored.part("qzeros", axes=2).shape
    bits = 32 * words // outputs
    if bits not in known or 32 * words != outputs * bits:
        stored.refuse("qzeros", f"has {words} words a row, and prunus reads codes of {known} bits")
    if bits != described:
        stored.refuse("qzeros", f"has codes of {bits} bits, and config.json says {described}")
    return groups, bits


def _mxfp4(stored: StoredParts) -> Weight:
    """The experts of gpt-oss: blocks of 32 FP4 values, of the transposed matrices."""
    shape = stored.part("_blocks", axes=4, dtypes=(torch.uint8,)).shape
    experts, outputs, groups, size = shape
    if size != 16:
        stored.refuse("_blocks", f"has blocks of {2 * size} values, and those of MXFP4 have 32")
    stored.scale("_scales", shape[:3])

    def coded(parts: dict[str, Tensor]) -> Coded:
        codes_OI = from_stream(parts["_blocks"].flatten(1), 4)
        return Coded(codes_OI, parts["_scales"], None, (1, 32), values=FP4_BY_CODE)

    return Weight(stored.stem, stored.parts, (experts, 32 * groups, outputs), coded, True)


def _packed(stored: StoredParts) -> Weight:
    """compressed-tensors: integers of 1 to 8 bits in 32-bit words."""
    info = stored.part("_packed", axes=2, dtypes=(torch.int32, torch.uint8))
    if info.dtype == torch.uint8:
        return _packed_fp4(stored)
    stored.part("_shape", (2,), dtypes=_INDICES)
    outputs, inputs = shape = tuple(stored.checkpoint.whole(stored.parts["_shape"]).tolist())
    bits = 32 * info.shape[1] // max(1, inputs)
    if not 1 <= bits <= 8 or info.shape != (outputs, -(-inputs * bits // 32)):
        stored.refuse("_packed", f"has shape {info.shape}, and the weight {shape}")
    block, kind = stored.grid("_scale", shape, stored.kinds("_packed", "int", bits))
    rows, groups = grid = _rows_and_columns(shape, block)
    if stored.has("_zero_point"):
        stored.part("_zero_point", (-(-rows * bits // 32), groups))

    def zeros(zero_point: Tensor) -> Tensor:
        return _from_words(zero_point.T, bits, rows).T

    def coded(parts: dict[str, Tensor]) -> Coded:
        scale_XY = parts["_scale"].reshape(grid)
        # Codes and zero points are counted from the lowest integer on.
        zero_XY = torch.full(grid, 2 ** (bits - 1))
        if "_zero_point" in parts:
            zero_XY = zeros(parts["_zero_point"])
        codes_OI = _from_words(parts["_packed"], bits, inputs)
        return Coded(codes_OI, scale_XY, zero_XY, block, parts.get("_g_idx"))

    _check_kind(stored, kind, shape, block, zeros, 2 ** (bits - 1))
    return Weight(stored.stem, stored.parts, shape, coded)


def _check_kind(
    stored: StoredParts,
    kind: Mapping[str, Any],
    shape: tuple[int, ...],
    block: tuple[int, int],
    zeros: Callable[[Tensor], Tensor] = Tensor.float,
    middle: int = 0,
) -> None:
    """Check the parts that `actorder` and `symmetric` of compressed-tensors ask for."""
    has_order = kind.get("actorder") in ("group", "dynamic", True)
    stored.index("_g_idx", shape, block[1], "actorder", has_order)
    stored.zeros("_zero_point", "symmetric", kind.get("symmetric") is not False, zeros, middle)


def _packed_fp4(stored: StoredParts) -> Weight:
    """compressed-tensors: NVFP4, whose weight has a scale for its scales, or MXFP4 without one."""
    outputs, half = stored.checkpoint.tensors[stored.parts["_packed"]].shape
    shape = outputs, 2 * half
    block, kind = stored.grid("_scale", shape, stored.kinds("_packed", "float", 4))
    grid, is_nvfp4 = _rows_and_columns(shape, block), kind.get("strategy") == "tensor_group"
    if is_nvfp4:
        stored.scale("_global_scale", (1,), ())
    for role in ("_zero_point", *(() if is_nvfp4 else ("_global_scale",))):
        if stored.has(role):
            stored.refuse(role, f"belongs to no FP4 of strategy {kind.get('strategy')}")
    _check_kind(stored, kind, shape, block)

    def coded(parts: dict[str, Tensor]) -> Coded:
        scale_XY = _as_floats(parts["_scale"]).reshape(grid)
        if is_nvfp4:
            scale_XY = scale_XY / parts["_global_scale"].float()
        codes_OI = from_stream(parts["_packed"], 4)
        return Coded(codes_OI, scale_XY, None, block, parts.get("_g_idx"), FP4_BY_CODE)

    return Weight(stored.stem, stored.parts, shape, coded)


def _scaled(stored: StoredParts) -> Weight:
    """Floats or integers of 8 bits, with scales for the tensor, its rows, groups or blocks."""
    is_described = stored.described["quant_method"] == "compressed-tensors"
    info = stored.part("", dtypes=_BYTES if is_described else _FP8)
    if len(info.shape) not in (2, 3):
        stored.refuse("", f"has shape {info.shape}, and no scale belongs to such a tensor")
    if is_described:
        kinds = stored.kinds("", "float" if info.dtype in _FP8 else "int")
    elif size := stored.described.get("weight_block_size"):
        kinds = [{"weight_block_size": size}]
    else:
        kinds = [{"strategy": "channel"}, {"strategy": "tensor"}]
    role = "_scale_inv" if stored.has("_scale_inv") else "_scale"
    block, kind = stored.grid(role, info.shape, kinds)
    grid = _rows_and_columns(info.shape, block)
    if stored.has("_zero_point"):
        grid_shape = stored.checkpoint.tensors[stored.parts[role]].shape
        stored.part("_zero_point", grid_shape, dtypes=(*_BYTES, *_SCALES, *_INDICES))
    _check_kind(stored, kind, info.shape, block)

    def coded(parts: dict[str, Tensor]) -> Coded:
        zero = parts.get("_zero_point")
        zero_XY = None if zero is None else zero.reshape(grid)
        scale_XY = parts[role].reshape(grid)
        return Coded(parts[""], scale_XY, zero_XY, block, parts.get("_g_idx"))

    return Weight(stored.stem, stored.parts, info.shape, coded)


def _rows_and_columns(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """The shape of the scales of one matrix."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


#: `quant_method` -> the end of the name of the part that has the codes -> its layout. Without such
#: an end it is a tensor in FP8 or int8 with the name of the weight.
METHODS: dict[str, dict[str, Callable[[StoredParts], Weight]]] = {
    "awq": {"qweight": _awq},
    "compressed-tensors": {"_packed": _packed, "": _scaled},
    "fbgemm_fp8": {"": _scaled},
    "fp8": {"": _scaled},
    "gptq": {"qweight": _gptq},
    "mxfp4": {"_blocks": _mxfp4},
}


def _unread(where: Path | str, method: str, what: str) -> str:
    """The message that prunus does not read a method, and which program unpacks it."""
    known = (f"{x} in {_BITS[x]} bits" if x in _BITS else x for x in METHODS)
    return (
        f"{where} is quantised, and its quant_method {what} is none that prunus reads "
        f"({', '.join(known)}): {unpack(method)}"
    )


class DenseCheckpoint(Checkpoint):
    """The safetensors files of a folder in few bits, as a dense checkpoint.

    Folder, files and fingerprint are those of the stored checkpoint. `tensors` has the dense
    weights in place of their parts, and what reads a tensor reads a dense one: the four methods
    below. Every other method of `Checkpoint` calls these, or tells of files.

    Args:
        files: The checkpoint as it is stored.
        described: The entry quantization_config of config.json.
        dtype: The dtype of the weights that are expanded.

    Raises:
        ValueError: prunus does not read the method, or the tensors are not what it stores.
    """

    def __init__(self, files: Checkpoint, described: Mapping[str, Any], dtype: torch.dtype) -> None:
        if (method := method_of(described)) not in METHODS:
            raise ValueError(_unread(files.folder, method, method))
        check_fields(files.folder, described)
        vars(self).update(vars(files))  # in place of the constructor, which opens files
        self._files, self._dtype = files, dtype
        self._weights = {weight.name: weight for weight in _weights(files, described)}
        if not self._weights:
            raise ValueError(
                f"{files.folder}: config.json says that the weights are quantised by "
                f"{described['quant_method']}, and no tensor is stored so: config and weights do "
                "not belong together"
            )
        parts = {name for weight in self._weights.values() for name in weight.parts.values()}
        self.tensors = {
            name: info
            for name, info in files.tensors.items()
            if name not in parts and not _OF_ACTIVATIONS.search(name)
        }
        for name, weight in self._weights.items():
            file = files.tensors[next(iter(weight.parts.values()))].file
            self.tensors[name] = TensorInfo(file, weight.shape, dtype, 0)

    def read(self, names: Iterable[str], pinned: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, dense tensor) in the given order; see `Checkpoint.read`."""
        for name in names:
            if name in self._weights:
                yield name, self._weights[name].read(self._files, self._dtype, pinned)
            else:
                yield from self._files.read([name], pinned)

    def pieces(self, name: str, most: int = VALUES, begin: int = 0) -> Iterator[Tensor]:
        """The values of a dense tensor in order; see `Checkpoint.pieces`."""
        if name not in self._weights:
            return self._files.pieces(name, most, begin)
        size = self._dtype.itemsize
        return iter(self.whole(name).flatten()[begin // size :].split(most // size))

    def first_matrix(self, name: str) -> Tensor:
        """The first matrix of a dense tensor; see `Checkpoint.first_matrix`."""
        if name not in self._weights:
            return self._files.first_matrix(name)
        return self._weights[name].read_first_matrix(self._files, self._dtype)

    def stored_nbytes(self, name: str) -> int:
        """Bytes of all parts of a tensor."""
        parts = self._weights[name].parts.values() if name in self._weights else [name]
        return self._files.nbytes(parts)


def _weights(checkpoint: Checkpoint, described: Mapping[str, Any]) -> Iterator[Weight]:
    """Every weight that is stored in codes."""
    described = {**described, "quant_method": method_of(described)}
    taken, rules = set[str](), rules_of(checkpoint, described)
    for end, layout in METHODS[described["quant_method"]].items():
        # A weight comes before its parts, whose names are longer.
        for name in sorted(checkpoint.tensors):
            is_code = bool(end) or checkpoint.tensors[name].dtype in _BYTES
            if name.endswith(end) and is_code and name not in taken:
                weight = layout(StoredParts(checkpoint, name.removesuffix(end), described, rules))
                taken |= set(weight.parts.values())
                yield weight
