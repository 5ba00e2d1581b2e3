"""Checkpoints in few bits, written by slow and obvious code, with the dense weights they stand for.

Each format stores random codes, with scales and zero points that are random too. Its dense weights
follow from the formula in the documentation of the format, one group after the other.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from changes import edit_json
from tiny import stored

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
#: The columns in a word of AWQ with 4 bits, from its low bits on.
AWQ_WORD = [0, 2, 4, 6, 1, 3, 5, 7]
Parts = dict[str, torch.Tensor]


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of each row, from low to high bits, in as many int32 as they need."""
    rows = []
    for row in codes.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        size = 4 * math.ceil(len(row) * bits / 32)
        rows.append(torch.frombuffer(bytearray(number.to_bytes(size, "little")), dtype=torch.int32))
    return torch.stack(rows)


def codes(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape)


def scales(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(shape) * 0.02 + 0.001).to(dtype)


def gptq(
    shape: tuple[int, int], bits: int, form: str, ordered: bool, wide: int = 16
) -> tuple[Parts, torch.Tensor]:
    """GPTQ in groups of inputs, which have the order of the inputs or any other one.

    The last group of those in the order of the inputs may be shorter.
    """
    rows, columns = shape
    codes_OI, zeros_GO = codes(shape, bits), codes((math.ceil(columns / wide), rows), bits)
    scales_GO, g_idx = scales(zeros_GO.shape, torch.float16), torch.arange(columns) // wide
    if not ordered:
        g_idx = g_idx[torch.randperm(columns)]
    stored_GO = packed(zeros_GO, bits)
    if form == "gptq":  # one less in each field of a word, as one subtraction
        stored_GO = stored_GO - int("0x11111111" if bits == 4 else "0x01010101", 16)
    parts = {"qweight": packed(codes_OI, bits).T, "qzeros": stored_GO, "scales": scales_GO}
    dense_OI = torch.stack(
        [(codes_OI[:, i] - zeros_GO[g]).half() * scales_GO[g] for i, g in enumerate(g_idx)], dim=1
    )
    return parts | {"g_idx": g_idx.int()}, dense_OI


def without_index(shape: tuple[int, int]) -> tuple[Parts, torch.Tensor]:
    """GPTQ as AutoRound packs it: without `g_idx`, in groups that may not fill the inputs."""
    parts, dense = gptq(shape, 4, "gptq", ordered=True, wide=24)
    return {role: part for role, part in parts.items() if role != "g_idx"}, dense


def awq(shape: tuple[int, int], bits: int, wide: int = 16) -> tuple[Parts, torch.Tensor]:
    """AWQ in groups of inputs, of which the last may be shorter."""
    rows, columns = shape
    codes_IO, zeros_GO = (
        codes((columns, rows), bits),
        codes((math.ceil(columns / wide), rows), bits),
    )
    scales_GO = scales(zeros_GO.shape, torch.float16)
    word = AWQ_WORD if bits == 4 else [0, 1, 2, 3]
    order = [first + place for first in range(0, rows, len(word)) for place in word]
    parts = {
        "qweight": packed(codes_IO[:, order], bits),
        "qzeros": packed(zeros_GO[:, order], bits),
        "scales": scales_GO,
    }
    dense_OI = torch.stack(
        [(codes_IO[i] - zeros_GO[i // wide]).half() * scales_GO[i // wide] for i in range(columns)],
        dim=1,
    )
    return parts, dense_OI


def fp8(shape: tuple[int, ...], high: int, wide: int, name: str) -> tuple[Parts, torch.Tensor]:
    """FP8 with a scale for each block of `high` rows and `wide` columns."""
    values = (torch.randn(shape) * 50).to(torch.float8_e4m3fn)
    grid = scales((math.ceil(shape[0] / high), math.ceil(shape[1] / wide)), torch.float32)
    full = grid.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]]
    return {"weight": values, name: grid}, values.float() * full


def integers(
    shape: tuple[int, int], bits: int, symmetric: bool, wide: int = 32
) -> tuple[Parts, torch.Tensor]:
    """pack-quantized of compressed-tensors, in groups of inputs."""
    codes_OI, zeros_OG = codes(shape, bits), codes((shape[0], math.ceil(shape[1] / wide)), bits)
    scale_OG = scales(zeros_OG.shape, torch.bfloat16)
    parts = {
        "weight_packed": packed(codes_OI, bits),
        "weight_scale": scale_OG,
        "weight_shape": torch.tensor(shape),
    }
    if symmetric:
        zeros_OG = torch.full_like(zeros_OG, 2 ** (bits - 1))
    else:
        parts["weight_zero_point"] = packed(zeros_OG.T, bits).T
    zeros_OI, scale_OI = (x.repeat_interleave(wide, 1)[:, : shape[1]] for x in (zeros_OG, scale_OG))
    return parts, (codes_OI - zeros_OI).bfloat16() * scale_OI


def int8(shape: tuple[int, int]) -> tuple[Parts, torch.Tensor]:
    """int-quantized of compressed-tensors, with a scale and a zero point for each row."""
    values, zeros = (
        torch.randint(-128, 128, shape).to(torch.int8),
        torch.randint(-9, 9, (shape[0], 1)),
    )
    scale = scales((shape[0], 1), torch.bfloat16)
    parts = {"weight": values, "weight_scale": scale, "weight_zero_point": zeros.to(torch.int8)}
    return parts, (values.int() - zeros).bfloat16() * scale


def fp4(shape: tuple[int, int], is_nvfp4: bool) -> tuple[Parts, torch.Tensor]:
    """nvfp4- and mxfp4-pack-quantized of compressed-tensors."""
    wide, codes_OI = 16 if is_nvfp4 else 32, codes(shape, 4)
    parts = {"weight_packed": codes_OI[:, ::2].byte() | codes_OI[:, 1::2].byte() << 4}
    grid = (shape[0], shape[1] // wide)
    if is_nvfp4:
        scale, whole = (torch.rand(grid) * 400 + 1).to(torch.float8_e4m3fn), torch.tensor([21000.0])
        parts |= {"weight_scale": scale, "weight_global_scale": whole}
        full = scale.float() / whole
    else:
        exponent = torch.randint(110, 130, grid, dtype=torch.uint8)
        parts, full = parts | {"weight_scale": exponent}, 2.0 ** (exponent.float() - 127)
    return parts, FP4[codes_OI] * full.repeat_interleave(wide, 1)


def tensors_of(form: str, bits: int, kind: str = "int", **more: Any) -> dict[str, Any]:
    """The quantization_config of compressed-tensors with one group."""
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": "group", **more}
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }


Make = Callable[[tuple[int, int]], tuple[Parts, torch.Tensor]]
#: Name -> the quantization_config, and from the shape of a weight to its parts and its values.
FORMATS: dict[str, tuple[dict[str, Any], Make]] = {
    "fp8 of a tensor": (
        {"quant_method": "fp8", "weight_block_size": None},
        lambda shape: fp8(shape, *shape, "weight_scale_inv"),
    ),
    "fp8 of rows": (
        {"quant_method": "fbgemm_fp8"},
        lambda shape: fp8(shape, 1, shape[1], "weight_scale"),
    ),
    "fp8 of blocks": (
        {"quant_method": "fp8", "weight_block_size": [24, 24]},
        lambda shape: fp8(shape, 24, 24, "weight_scale_inv"),
    ),
    "awq in 4 bits": (
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
        lambda shape: awq(shape, 4),
    ),
    "awq in 8 bits": (
        {"quant_method": "awq", "bits": 8, "group_size": 16, "version": "GEMM"},
        lambda shape: awq(shape, 8),
    ),
    "awq in uneven groups": (
        {"quant_method": "awq", "bits": 4, "group_size": 24, "version": "gemm"},
        lambda shape: awq(shape, 4, 24),
    ),
    "gptq without g_idx": (
        {"quant_method": "gptq", "bits": 4, "group_size": 24},
        without_index,
    ),
    "integers in uneven groups": (
        tensors_of("pack-quantized", 4, group_size=24, symmetric=False),
        lambda shape: integers(shape, 4, False, 24),
    ),
    "int8": (tensors_of("int-quantized", 8, strategy="channel", symmetric=False), int8),
    "float8 of rows": (
        tensors_of("float-quantized", 8, "float", strategy="channel"),
        lambda shape: fp8(shape, 1, shape[1], "weight_scale"),
    ),
    "float8 of blocks": (
        tensors_of("float-quantized", 8, "float", strategy="block", block_structure=[24, 24]),
        lambda shape: fp8(shape, 24, 24, "weight_scale"),
    ),
    "nvfp4": (
        tensors_of(
            "nvfp4-pack-quantized",
            4,
            "float",
            strategy="tensor_group",
            group_size=16,
            scale_dtype="torch.float8_e4m3fn",
        ),
        lambda shape: fp4(shape, True),
    ),
    "mxfp4": (
        tensors_of("mxfp4-pack-quantized", 4, "float", group_size=32, scale_dtype="torch.uint8"),
        lambda shape: fp4(shape, False),
    ),
}
#: gpt-oss, whose attention stays as it is.
FUSED = "experts of gpt-oss"
for _form, _bits, _ordered in (
    ("gptq", 4, True), ("gptq", 8, False), ("gptq_v2", 4, False), ("gptq_v2", 8, True),
):  # fmt: skip
    _config = {"quant_method": "gptq", "bits": _bits, "group_size": 16, "checkpoint_format": _form}
    FORMATS[f"{_form} in {_bits} bits"] = (
        _config,
        partial(gptq, bits=_bits, form=_form, ordered=_ordered),
    )
for _bits in range(1, 9):
    _config = tensors_of("pack-quantized", _bits, group_size=32, symmetric=_bits % 2 == 0)
    FORMATS[f"integers of {_bits} bits"] = (
        _config,
        partial(integers, bits=_bits, symmetric=_bits % 2 == 0),
    )


def gpt_oss_experts(shape: tuple[int, int, int]) -> tuple[Parts, torch.Tensor]:
    """The MXFP4 of gpt-oss: of experts whose dense matrices are (inputs, outputs)."""
    experts, inputs, outputs = shape
    both = [fp4((outputs, inputs), is_nvfp4=False) for _ in range(experts)]
    blocks = torch.stack([parts["weight_packed"].unflatten(1, (-1, 16)) for parts, _ in both])
    exponents = torch.stack([parts["weight_scale"] for parts, _ in both])
    return {"_blocks": blocks, "_scales": exponents}, torch.stack([x.T for _, x in both])


def quantize(source: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Two checkpoints from a dense one: in a format of `FORMATS`, and the same weights dense.

    The linears of all blocks are quantised, experts too, but not routers. Both folders have one
    name, so that results that hold it are comparable.
    """
    few, dense = (shutil.copytree(source, folder / x / "model") for x in ("few", "dense"))
    dtype = getattr(torch, json.loads((source / "config.json").read_text())["dtype"])
    described, make = FORMATS.get(name, ({"quant_method": "mxfp4"}, None))
    tensors, expected = stored(source), stored(source)
    torch.manual_seed(0)
    for key, weight in stored(source).items():
        fused = key.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if fused or (make and re.search(r"\.layers\..*(_proj|\.w[123])\.weight$", key)):
            parts, values = (gpt_oss_experts if fused else make)(tuple(weight.shape))
            del tensors[key]
            path = key.removesuffix("weight")
            tensors |= {path + part: tensor.contiguous() for part, tensor in parts.items()}
            expected[key] = values.to(dtype).contiguous()
    save_file(tensors, few / "model.safetensors", {"format": "pt"})
    save_file(expected, dense / "model.safetensors", {"format": "pt"})
    edit_json(few / "config.json", quantization_config=described)
    return few, dense
