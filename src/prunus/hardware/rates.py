"""How fast a device is: the constants of the forecast in `prunus.pruning.forecast`.

The constants of a processor core were measured by `benchmarks/cost_constants.py`, on the processor
that `DEVICES["core"].source` names. Those of GPUs are NOT measured. They are peak figures of the
vendors, times an assumed share of the peak.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

__all__ = ["ASSUMED_GPU", "DEVICES", "Devices", "Rates", "parse_devices"]

#: The share of a vendor's peak that large matrix products are assumed to reach. It is a guess.
ASSUMED_SHARE = 0.5


@dataclass(frozen=True)
class Rates:
    """The speed of one device, or of one processor core. All rates are per second.

    Attributes:
        source: where the figures come from; every output repeats it.
        products: floating-point operations in the blocks' own matrix products (bfloat16).
        products32: floating-point operations in float32 products: solvers.
        grams: floating-point operations in Gram matrices of 16-bit inputs. A GPU computes them in
            TensorFloat-32, which holds such inputs exactly.
        factor32: floating-point operations in float32 factorisations (Cholesky, triangular
            inverse).
        attention: floating-point operations in attention.
        elements: elements in simple work on activations: norms, activation functions, sums of
            squares.
        weights: weights from the stored weight to score, mask and pruned weight.
        swept: weights in SparseGPT's sweep, without its matrix products.
        columns: columns in SparseGPT's sweep, however short they are.
        finished: weights from the solved weight to the stored one: rounding, the check that they
            are finite, counting zeros.
        read: bytes read from disk.
        write: bytes written to disk.
        hashed: bytes hashed with SHA-256.
        bus: bytes sent between the host and a GPU, in one direction; None for a processor.
        link: bytes sent from one rank to another.
        latency: seconds of one synchronization of ranks.
        memory: bytes of one device; None for a processor, whose memory is that of the host.
        process: bytes that a process uses before it prunes anything.
        start: seconds of a run before its first block, without embeddings and imports.
    """

    source: str
    products: float
    products32: float
    grams: float
    factor32: float
    attention: float
    elements: float
    weights: float
    swept: float
    columns: float
    finished: float
    read: float
    write: float
    hashed: float
    bus: float | None
    link: float
    latency: float
    memory: float | None
    process: float
    start: float


def _vendor(
    name: str, half: float, single: float, memory: float, bandwidth: float, bus: float, link: float
) -> Rates:
    """A GPU by its data sheet.

    Args:
        name: the name of the GPU.
        half: TFLOP/s in bfloat16.
        single: TFLOP/s in float32.
        memory: GB.
        bandwidth: GB/s of its memory.
        bus: GB/s of PCIe, in one direction.
        link: GB/s of NVLink, in one direction.
    """
    usable = ASSUMED_SHARE * bandwidth * 1e9
    return Rates(
        source=f"{name}: NOT measured; the vendor's peaks, times {ASSUMED_SHARE:g} by assumption",
        products=ASSUMED_SHARE * half * 1e12,
        products32=ASSUMED_SHARE * single * 1e12,
        # TensorFloat-32 has half the peak of bfloat16 on all of these.
        grams=ASSUMED_SHARE * half / 2 * 1e12,
        factor32=0.1 * ASSUMED_SHARE * single * 1e12,
        attention=0.5 * ASSUMED_SHARE * half * 1e12,
        elements=usable / 16,
        weights=usable / 60,
        swept=usable / 200,
        columns=4e4,
        finished=usable / 20,
        read=2e9,
        write=1e9,
        hashed=1.5e9,
        bus=ASSUMED_SHARE * bus * 1e9,
        link=ASSUMED_SHARE * link * 1e9,
        latency=5e-5,
        memory=memory * 1e9,
        process=2e9,
        start=2.0,
    )


DEVICES: dict[str, Rates] = {
    "core": Rates(
        source="one core of an AMD EPYC (family 25, Zen 4), "
        "measured by benchmarks/cost_constants.py",
        products=2.16e11,
        products32=9.68e10,
        grams=9.68e10,
        factor32=4.81e10,
        attention=8.13e10,
        elements=2.55e9,
        weights=3.41e7,
        swept=6.24e7,
        columns=5.35e4,
        finished=5.94e8,
        read=1.89e9,
        write=1.29e9,
        hashed=1.8e9,
        bus=None,
        link=1.16e9,
        latency=0.000315,
        memory=None,
        process=4.41e8,
        start=0.16,
    ),
    "a100": _vendor(
        "A100 80 GB SXM", half=312, single=19.5, memory=80, bandwidth=2039, bus=32, link=300
    ),
    "h100": _vendor(
        "H100 80 GB SXM", half=989, single=67, memory=80, bandwidth=3350, bus=64, link=450
    ),
    "h200": _vendor(
        "H200 141 GB SXM", half=989, single=67, memory=141, bandwidth=4800, bus=64, link=450
    ),
}

#: Rates of files and transfers where the GPU is not known by name.
ASSUMED_GPU = DEVICES["a100"]


@dataclass(frozen=True)
class Devices:
    """What a run is distributed over.

    Attributes:
        text: the devices as the user wrote them.
        ranks: the number of ranks.
        rates: the speed of what each rank has: one GPU, or several cores together.
    """

    text: str
    ranks: int
    rates: Rates


def parse_devices(text: str) -> Devices:
    """Read "8xh100" (8 ranks with a GPU each), "2-cores" (one rank) or "4x8-cores" (4 ranks).

    Several cores are assumed to be as many times faster than one, except for disk, link and
    latency, which they share.

    Raises:
        ValueError: the text is something else; the message lists all devices.

    >>> parse_devices("4x8-cores").ranks
    4
    """
    match = re.fullmatch(r"(?:([1-9][0-9]*)x)?(?:([1-9][0-9]*)-cores?|([a-z0-9]+))", text)
    if match is None or (match[3] is not None and (match[3] == "core" or match[3] not in DEVICES)):
        gpus = ", ".join(name for name in DEVICES if name != "core")
        raise ValueError(
            f"the devices {text!r} are unknown: give [N x]GPU, such as 8xh100 ({gpus}), "
            "or [N x]M-cores, such as 2-cores or 4x8-cores"
        )
    ranks = int(match[1] or 1)
    if match[3] is not None:
        return Devices(text, ranks, DEVICES[match[3]])
    core, cores = DEVICES["core"], int(match[2])
    scales_with_cores = (
        "products",
        "products32",
        "grams",
        "factor32",
        "attention",
        "elements",
        "weights",
        "swept",
        "finished",
    )
    return Devices(
        text,
        ranks,
        replace(core, **{name: cores * getattr(core, name) for name in scales_with_cores}),
    )
