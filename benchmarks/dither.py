"""Turn a quantised GGUF file into a baseline that favours no quantisation grid.

    python benchmarks/dither.py MODEL.gguf DEST [--seed 0] [--overwrite]

The weights of such a file lie on a grid of a few levels. A quantiser whose grid is similar can
find the same levels again and would look better than it is on weights from training. This script
adds noise to every quantised weight, once: uniform between minus half and plus half of the step
between the levels of its block. Where the weight was before it was quantised is not known, but it
was within this range.

It writes DEST, a checkpoint in bfloat16, for comparisons between compression methods, not for use:
the noise is as large as the error that the file has already. Where the file stores the embedding
twice, the second time as the head, the checkpoint ties them, as the original did.

llama.cpp's converter makes its GGUF file from DEST, as from every checkpoint. A file made from
MODEL.gguf would hold the embedding twice, and all files quantised from that would be larger than
they need be.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    LlamaFileType,
    quants,
)

from prunus.formats.gguf.file import open_gguf
from prunus.formats.gguf.import_checkpoint import check_destination, head_is_embedding, import_gguf

__all__ = ["KINDS", "dither", "quantisation_steps", "write_dithered_gguf"]

#: Kind of tensor -> where a block of it holds the integers: (first byte, stop, the byte that is 1
#: for all integers in it). The other bytes hold scales. Q5_0 and Q6_K have low and high bits;
#: those of the integer 1 are all low.
KINDS = {
    GGMLQuantizationType.Q4_0: ((2, 18, 0x11),),
    GGMLQuantizationType.Q4_1: ((4, 20, 0x11),),
    GGMLQuantizationType.Q5_0: ((2, 6, 0x00), (6, 22, 0x11)),
    GGMLQuantizationType.Q8_0: ((2, 34, 0x01),),
    GGMLQuantizationType.Q4_K: ((16, 144, 0x11),),
    GGMLQuantizationType.Q6_K: ((0, 128, 0x11), (128, 192, 0x00)),
}
_UNQUANTISED = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
)


def quantisation_steps(data: Any, kind: GGMLQuantizationType) -> Any:
    """The distance between neighbouring levels of every weight, which is that of its sub-block.

    The levels of a sub-block are an affine function of an integer, so the step is the value of the
    integer 1 less the value of the integer 0.

    Args:
        data: bytes of the tensor as the file has them, (rows, bytes per row) uint8.
        kind: one of `KINDS`.

    Returns:
        (rows, columns), float32, not negative.
    """
    size = quants.GGML_QUANT_SIZES[kind][1]
    values = []
    for integer in (0, 1):
        blocks = np.array(data).reshape(-1, size)
        for first, stop, one in KINDS[kind]:
            blocks[:, first:stop] = one * integer
        values.append(quants.dequantize(blocks.reshape(data.shape), kind))
    return np.abs(values[1] - values[0])


def write_dithered_gguf(source: Path, target: Path, seed: int) -> dict[str, int]:
    """Write a copy of a GGUF file with noise in its quantised weights, as bfloat16.

    Tensors that were not quantised (norms, biases) are rounded to bfloat16 as in the checkpoint,
    but stay float32, as llama.cpp wants them.

    Returns:
        Name of a tensor -> the number of its weights with noise.

    Raises:
        ValueError: a tensor is of a kind that `KINDS` does not have.
    """
    reader = GGUFReader(source)
    for tensor in reader.tensors:
        if tensor.tensor_type not in (*KINDS, *_UNQUANTISED):
            known = ", ".join(kind.name for kind in KINDS)
            raise ValueError(
                f"{source}: {tensor.name} is of kind {tensor.tensor_type.name}; give a file whose "
                f"quantised tensors are {known}"
            )
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value, item = field.contents(), None
        if field.types[0] == GGUFValueType.ARRAY:
            item = field.types[-1]
        if field.name == "general.file_type":
            value = int(LlamaFileType.MOSTLY_BF16)
        writer.add_key_value(field.name, value, field.types[0], sub_type=item)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if len(shape) == 1:
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), tensor.n_elements * 4)
        else:
            writer.add_tensor_info(
                tensor.name,
                (*shape[:-1], shape[-1] * 2),
                np.dtype(np.uint8),
                int(tensor.n_elements) * 2,
                raw_dtype=GGMLQuantizationType.BF16,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    noisy = {}
    places = {tensor.name: (position, tensor) for position, tensor in enumerate(reader.tensors)}
    # An embedding that is the head as well gets the head's values and noise, and stays its copy.
    twice = "output.weight" in places and head_is_embedding(open_gguf(source))
    for name in places:
        same = "output.weight" if twice and name == "token_embd.weight" else name
        position, tensor = places[same]
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        noisy[name] = 0
        if tensor.tensor_type in KINDS:
            # A generator for each tensor, so that the noise does not depend on the others.
            noise = np.random.default_rng([seed, position]).random(values.shape, dtype=np.float32)
            noise -= np.float32(0.5)
            noise *= quantisation_steps(tensor.data, tensor.tensor_type)
            values += noise
            noisy[name] = values.size
        rounded = quants.quantize(values, GGMLQuantizationType.BF16)
        if values.ndim == 1:
            rounded = quants.dequantize(rounded, GGMLQuantizationType.BF16)
        writer.write_tensor_data(rounded)
    writer.close()
    return noisy


def dither(source: Path, dest: Path, *, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Write the checkpoint `dest`.

    Args:
        source: a GGUF file with quantised weights.
        dest: folder for the checkpoint.
        seed: of the noise.
        overwrite: replace what is there.

    Returns:
        The summary of `import_gguf`, and the number of weights with noise as `dithered`.
    """
    source, dest = Path(source), Path(dest)
    check_destination(dest, overwrite=overwrite)
    noisy_file = dest.with_name(f".{dest.name}.partial.gguf")
    try:
        noisy = write_dithered_gguf(source, noisy_file, seed)
        summary = import_gguf(noisy_file, dest, overwrite=overwrite)
    finally:
        noisy_file.unlink(missing_ok=True)
    if summary["tied"] and "output.weight" in noisy:
        del noisy["token_embd.weight"]  # the checkpoint has the head alone, as both
    return {**summary, "dithered": sum(noisy.values()), "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("dest", type=Path, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    try:
        done = dither(
            arguments.source, arguments.dest, seed=arguments.seed, overwrite=arguments.overwrite
        )
    except (ValueError, OSError, ModuleNotFoundError) as fault:
        sys.exit(f"error: {fault}")
    print(
        f"{arguments.dest}: noise in {done['dithered']:,} of {done['parameters']:,} weights, "
        f"seed {arguments.seed}"
    )


if __name__ == "__main__":
    main()
