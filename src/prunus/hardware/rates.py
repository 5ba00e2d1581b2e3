"""What a device does in a second: the constants of `forecast.py`.

Those of a processor core were measured by `benchmarks/cost_constants.py` on the machine named here. Those of GPUs are NOT
measured: they are vendors' peak figures, times a share of the peak that is a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

__all__ = ["DEVICES", "Devices", "Rates", "parse_devices"]

#: The share of a vendor's peak that large matrix products are taken to reach. A guess.
ASSUMED_SHARE = 0.5


@dataclass(frozen=True)
class Rates:
    """One device, or one processor core.

    Attributes:
        source: where the figures come from; every output says so.
        products: floating-point operations a second in the blocks' own matrix products (bfloat16).
        products32: the same in float32: Gram matrices and solvers.
        factor32: the same in factorisations (Cholesky, triangular inverse).
        attention: floating-point operations a second in attention.
        elements: elements a second of simple work on activations: norms, activation functions, sums of squares.
        weights: weights a second from stored weight to score, mask and pruned weight.
        swept: weights a second in SparseGPT's sweep, beside its matrix products; and columns a second, however short.
        finished: weights a second from solved weight to stored one: rounded, seen to be finite, zeros counted.
        read, write: bytes a second of the disk. hashed: bytes a second of SHA-256.
        link: bytes a second from one rank to another. latency: seconds of a meeting.
        memory: bytes of one device; None for a processor, whose memory is the host's.
        process: bytes that a process has before it prunes anything.
        start: seconds of a run before its first block, beside the embeddings; imports not counted.
    """

    source: str
    products: float
    products32: float
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
    link: float
    latency: float
    memory: float | None
    process: float
    start: float


def _vendor(
    name: str, half: float, single: float, memory: float, bandwidth: float, link: float
) -> Rates:
    """A GPU by its data sheet: TFLOP/s in bfloat16 and float32, GB, GB/s of memory and of NVLink in one direction."""
    usable = ASSUMED_SHARE * bandwidth * 1e9
    return Rates(
        source=f"{name}: NOT measured; the vendor's peaks, times {ASSUMED_SHARE:g} by assumption",
        products=ASSUMED_SHARE * half * 1e12,
        products32=ASSUMED_SHARE * single * 1e12,
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
        link=ASSUMED_SHARE * link * 1e9,
        latency=5e-5,
        memory=memory * 1e9,
        process=2e9,
        start=2.0,
    )


DEVICES: dict[str, Rates] = {
    "core": Rates(
        source="one core of an AMD EPYC (family 25, Zen 4), measured by benchmarks/cost_constants.py",
        products=2.16e11,
        products32=9.68e10,
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
        link=1.16e9,
        latency=0.000315,
        memory=None,
        process=4.41e8,
        start=0.16,
    ),
    "a100": _vendor("A100 80 GB SXM", half=312, single=19.5, memory=80, bandwidth=2039, link=300),
    "h100": _vendor("H100 80 GB SXM", half=989, single=67, memory=80, bandwidth=3350, link=450),
    "h200": _vendor("H200 141 GB SXM", half=989, single=67, memory=141, bandwidth=4800, link=450),
}


@dataclass(frozen=True)
class Devices:
    """What a run is spread over: so many ranks, each with one device, or with so many cores."""

    text: str
    ranks: int
    rates: Rates


def parse_devices(text: str) -> Devices:
    """Read "8xh100" (8 ranks with a GPU each), "2-cores" (one rank), "4x8-cores" (4 ranks of 8 cores each).

    Cores are taken to be as fast together as alone, but for disk, link and latency, which they share.

    Raises:
        ValueError: anything else; lists what there is.
    """
    found = re.fullmatch(r"(?:([1-9][0-9]*)x)?(?:([1-9][0-9]*)-cores?|([a-z0-9]+))", text)
    if found is None or (found[3] is not None and (found[3] == "core" or found[3] not in DEVICES)):
        gpus = ", ".join(name for name in DEVICES if name != "core")
        raise ValueError(
            f"the devices {text!r} are unknown: give [N x]GPU, such as 8xh100 ({gpus}), or [N x]M-cores, such as 2-cores "
            "or 4x8-cores"
        )
    ranks = int(found[1] or 1)
    if found[3] is not None:
        return Devices(text, ranks, DEVICES[found[3]])
    core, cores = DEVICES["core"], int(found[2])
    each = (
        "products",
        "products32",
        "factor32",
        "attention",
        "elements",
        "weights",
        "swept",
        "finished",
    )
    return Devices(
        text, ranks, replace(core, **{name: cores * getattr(core, name) for name in each})
    )
