"""What a GGUF file is, whatever its name says: its bits, its types, and how it was made.

A name such as Q2_K is that of a preset of llama-quantize, which gives types to tensors. In files
of small models it is often wrong: if 256 does not divide the width of a weight, the weight gets a
type whose spans have 32 weights, and these have more bits. The linears of SmolLM2-135M "in Q2_K"
have 4.2 bits per weight for this reason. The tables below are those of llama.cpp (llama-quant.cpp).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.document import Table, short_names, table_of
from prunus.formats.gguf.file import RECORD_FIELD, GgufFile, check_extra, open_gguf
from prunus.formats.gguf.package import package
from prunus.formats.gguf.presets import types_of
from prunus.formats.gguf.types import PLAIN_DTYPES, TYPES
from prunus.model.levels import value_bits
from prunus.rounding.lattice import lossless_type
from prunus.rounding.llama_cpp import PRESETS, SHORT
from prunus.words import counted, in_bytes

# Presets that prunus does not know or that have no types -> the types that they give to matrices.
_OTHERS = {
    **dict.fromkeys(PLAIN_DTYPES, ""),
    "TQ1_0": "TQ1_0 Q4_K", "TQ2_0": "TQ2_0 Q4_K",
    "IQ1_S": "IQ1_S IQ2_XXS Q2_K Q4_K Q5_K", "IQ1_M": "IQ1_M IQ2_XXS Q2_K Q4_K Q5_K",
}  # fmt: skip
_NAMES = "|".join([*PRESETS, *SHORT, *_OTHERS])
_IN_NAME = re.compile(rf"(?<![A-Z\d])({_NAMES})(?![A-Z\d_])", re.IGNORECASE)
# Type -> what replaces it if its span does not divide a width (`tensor_type_fallback`). Earlier
# versions of llama.cpp have IQ4_NL for Q2_K and Q3_K.
_REPLACEMENTS = {
    **{name: {kind.fallback} for name, kind in TYPES.items() if kind.fallback},
    **{"Q2_K": {"Q4_0", "IQ4_NL"}, "Q3_K": {"Q4_0", "IQ4_NL"}},
    **{"IQ1_S": {"IQ4_NL"}, "IQ1_M": {"IQ4_NL"}, "TQ1_0": {"Q4_0"}, "TQ2_0": {"Q4_0"}},
}
# Where llama-quantize notes its importance matrix.
_IMPORTANCES = "quantize.imatrix."
# Weights of a linear in which a grid is looked for: 256 blocks.
_SAMPLE = 2**13


@dataclass(frozen=True)
class FileAudit:
    """What a GGUF file is.

    Attributes:
        file: Its path.
        bytes: Its size.
        architecture: llama.cpp's name of the kind of model.
        blocks: Number of blocks.
        by_prunus: Whether `prunus compress` made it.
        presets: "name" and "general.file_type" -> the preset of llama-quantize that they say.
        bits: "linears", "embedding" and "head" -> bits per weight. A head that is the embedding has
            no entry. Linears are the matrices in the blocks but for routers.
        types: Type -> `tensors` and `bytes` that have it, the most bytes first.
        replaced: Tensors with a larger type than the preset of the name (if it says none, that of
            `general.file_type`) gives, because its span does not divide their width: `tensor`, its
            `columns` and `type`, the types that it is `in_place_of`, and by how many bytes it is
            larger than in the largest of these (`more_bytes`). There are none in files of prunus,
            whose types are no preset's.
        other_types: Types that this preset gives to no tensor, nor puts in place of others -> how
            many tensors have them.
        importances: What llama-quantize noted of its importance matrix: `file`, `dataset`,
            `entries_count`, `chunks_count`; empty if it used none or did not say.
        coarser: "Q4_0's grid" or "a grid of 4 bits", for example -> how many linears lie on it. It
            is coarser than their type: they were rounded before. None if the weights were not read.
    """

    file: str
    bytes: int
    architecture: str
    blocks: int
    by_prunus: bool
    presets: dict[str, str]
    bits: dict[str, float]
    types: dict[str, dict[str, int]]
    replaced: list[dict[str, Any]]
    other_types: dict[str, int]
    importances: dict[str, Any]
    coarser: dict[str, int] | None = None

    @classmethod
    def of(cls, path: Path, reads_weights: bool = False) -> FileAudit:
        """Read the header of a file, and a few weights of each linear if they are asked for.

        Raises:
            ModuleNotFoundError: The extra `gguf` is not installed.
            ValueError: The file is damaged, or holds no model.
        """
        check_extra()
        file = open_gguf(path)
        types: dict[str, Counter[str]] = defaultdict(Counter)
        for tensor in file.tensors.values():
            types[tensor.tensor_type.name].update(tensors=1, bytes=tensor.n_bytes)
        parts = {"embedding": "token_embd.weight", "head": "output.weight"}
        names = {
            "linears": file.linears,
            **{part: [x] for part, x in parts.items() if x in file.tensors},
        }
        presets, by_prunus = _presets_of(path, file), bool(str(file.get(RECORD_FIELD, "")).strip())
        # The types of a file of prunus are no preset's.
        said = None if by_prunus else next(iter(presets.values()), None)
        replaced, other_types = _compare(file, said)
        noted = {x: y.value for x, y in file.header.fields.items() if x.startswith(_IMPORTANCES)}
        return cls(
            file=str(path),
            bytes=path.stat().st_size,
            architecture=file.architecture,
            blocks=file.get(f"{file.architecture}.block_count"),
            by_prunus=by_prunus,
            presets=presets,
            bits={x: bits for x, each in names.items() if (bits := file.bits(each)) is not None},
            types={x: {**types[x]} for x in sorted(types, key=lambda x: -types[x]["bytes"])},
            replaced=replaced,
            other_types=other_types,
            importances={x.removeprefix(_IMPORTANCES): value for x, value in noted.items()},
            coarser=dict(Counter(_coarser(file))) if reads_weights else None,
        )

    def facts(self) -> dict[str, str | None]:
        """What the file is, for people; None for what it does not say."""
        noted, head = self.importances, "head" in self.bits
        chunks = f", {noted['chunks_count']} chunks" if "chunks_count" in noted else ""
        return {
            "kind of model": f"{self.architecture}, {counted(self.blocks, 'block')}",
            "bytes": f"{self.bytes:,}",
            "made by": "prunus compress" if self.by_prunus else None,
            **{f"preset by {where}": preset for where, preset in self.presets.items()},
            **{f"bits per weight, {part}": f"{bits:.3f}" for part, bits in self.bits.items()},
            **({} if head else {"bits per weight, head": "is the embedding"}),
            "larger types for their width": f"{counted(len(self.replaced), 'tensor')}, "
            f"{in_bytes(sum(x['more_bytes'] for x in self.replaced))} more"
            if self.replaced
            else None,
            "types that the preset lacks": ", ".join(
                f"{kind} in {counted(count, 'tensor')}" for kind, count in self.other_types.items()
            )
            or None,
            "linears on a coarser grid": ", ".join(
                f"{count} on {grid}" for grid, count in (self.coarser or {}).items()
            )
            or None,
            "importance matrix": f"{noted.get('file', 'yes')}{chunks}" if noted else "not named",
            "its text": noted.get("dataset") and str(noted["dataset"]),
            **{
                f"in {kind}": f"{in_bytes(each['bytes'])}, {counted(each['tensors'], 'tensor')}"
                for kind, each in self.types.items()
            },
        }

    @staticmethod
    def tables(audits: Sequence[FileAudit], note: str | None = None) -> list[Table]:
        """What files are, side by side, and their tensors with larger types than a preset's.

        Args:
            audits: The files.
            note: What to say below the first table; None for nothing.
        """
        names = short_names(audit.file for audit in audits)
        facts = {names[audit.file]: audit.facts() for audit in audits}
        whats = dict.fromkeys(what for each in facts.values() for what in each)
        rows = [
            {"fact": what, **{name: each.get(what) for name, each in facts.items()}}
            for what in whats
        ]
        shown = [row for row in rows if any(row[name] is not None for name in facts)]
        tables = [
            table_of(
                f"What the {'files are' if len(audits) > 1 else 'file is'}", shown, {}, note or ""
            )
        ]
        groups: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
        for audit in audits:
            for x in audit.replaced:
                alike = re.sub(r"\d+", "*", x["tensor"]), x["columns"], x["type"]
                key = names[audit.file], *alike, " or ".join(x["in_place_of"])
                groups[key].update(tensors=1, more=x["more_bytes"])
        larger = [
            {
                **dict(zip(("file", "tensors", "width", "type", "in place of"), key, strict=True)),
                **{"count": each["tensors"], "MB more": each["more"] / 1e6},
            }
            for key, each in groups.items()
        ]
        if larger:
            tables.append(
                table_of(
                    "Larger types than the preset's, because of the width",
                    larger,
                    {"MB more": ".1f"},
                    "MB more: than in the largest type that the preset would have here",
                )
            )
        return tables


def _presets_of(path: Path, file: GgufFile) -> dict[str, str]:
    """The presets that the name of a file and its field say, the name first."""
    presets = {}
    if found := _IN_NAME.findall(path.name.upper()):
        presets["name"] = SHORT.get(found[-1], found[-1])
    with contextlib.suppress(ValueError):  # no number of a preset that is known
        name = package().LlamaFileType(file.get("general.file_type")).name
        presets["general.file_type"] = re.sub("^(MOSTLY|ALL)_", "", name)
    return presets


def _compare(file: GgufFile, preset: str | None) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The tensors with larger types than a preset's, and how many have which other types."""
    if preset not in {*PRESETS, *_OTHERS}:
        return [], {}
    gguf, replaced, others = package(), [], Counter[str]()
    experts = file.get(f"{file.architecture}.expert_count", 0)
    given = types_of(preset, experts) if preset in PRESETS else _OTHERS[preset].split()
    usual = {"Q6_K", *given, *PLAIN_DTYPES}
    for name, tensor in file.tensors.items():
        kind, columns = tensor.tensor_type.name, tensor.shape[0]
        if kind in usual:
            continue
        wanted = [x for x in sorted(usual) if kind in _REPLACEMENTS.get(x, ())]
        sizes = {x: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[x]] for x in wanted}
        bits = {x: 8 * nbytes / span for x, (span, nbytes) in sizes.items() if columns % span}
        if bits:
            more = tensor.n_bytes - round(tensor.n_elements * max(bits.values()) / 8)
            found = {"tensor": name, "columns": columns, "type": kind}
            replaced.append(found | {"in_place_of": [*bits], "more_bytes": more})
        else:
            others[kind] += 1
    return replaced, dict(others)


def _coarser(file: GgufFile) -> Iterator[str]:
    """Yield the grid of each linear whose values lie on a coarser one than its type has.

    It has the name of the smallest type with these values. K types have no lattice that could be
    found, and a type of more bits does not keep the lattice: then the bits are counted.
    """
    for name in file.linears:
        kind, (*rows, columns) = file.tensors[name].tensor_type.name, file.shape(name)
        # Codebooks that prunus does not write have fewer bits than any grid.
        levels = len(TYPES[kind].values) if kind in TYPES else 2**16 * (kind in PLAIN_DTYPES)
        rows_O = torch.arange(min(-(-_SAMPLE // columns), math.prod(rows)))
        rows_OI = torch.cat([*file.rows(name, rows_O)])
        bits = value_bits(rows_OI.flatten())
        if bits is not None and 2**bits < levels:
            found = lossless_type(rows_OI, (x for x in TYPES.values() if len(x.values) < levels))
            yield f"{found.name}'s grid" if found else f"a grid of {counted(bits, 'bit')}"
