"""A child of the test of damaged packed weights: every kernel and torch must give one answer.

    python hostile_weights.py SEED CASES

Each case damages the description or the tensors of a small packed linear, or builds planes whose
layers nearly all escape. It is refused, by every kernel of this machine and by torch, or has the
same weights with all of them. Prints one JSON line: how many cases were refused and how many fine.
"""

import json
import os
import random
import sys
from collections import Counter
from typing import Any

import numpy as np
import torch
from prunus.runtime.bitmap import pack_weight
from prunus.runtime.description import Description, PackedShape, QuantizedShape
from prunus.runtime.weight import PlaneCode, QuantizedWeight, named_tensors

from hostile_damage import mutate_json
from prunus.runtime import forms, planes
from prunus.runtime.kernels import library

Tensors = dict[str, torch.Tensor]
CODES = [(3, (4, 4, 1, 1)), (3, (4, 4, 2)), (3, (4, 3, 3, 2, 1)), (3, (4, 4, 1, 1, 1, 1))]


def modes() -> list[str]:
    """The instruction sets of this machine, and `off` for torch."""
    kernels = library.load("best")
    best = -1 if kernels is None else kernels.library.prunus_best_isa()
    return ["off", *library.ISAS[: best + 1]]


def bitmap(dice: random.Random) -> tuple[Tensors, dict[str, Any]]:
    dtype = dice.choice([torch.bfloat16, torch.float16])
    weight = torch.randn(dice.randint(1, 9), dice.choice([8, 65, 200])).to(dtype)
    weight[torch.rand(weight.shape) < dice.choice([0.0, 0.5, 0.9])] = 0
    values = dice.choice([dtype, torch.int8])
    packed = pack_weight(weight, values)
    stored = int((weight != 0).sum()) if packed.mask is not None else weight.numel()
    rare = None if packed.coding is None else packed.coding.rare.shape[0]
    shape = PackedShape(*packed.shape, stored, rare)
    described = Description(str(values).removeprefix("torch."), {"up": shape})
    return named_tensors("up", packed), described.to_dict()


def quantized(dice: random.Random) -> tuple[Tensors, dict[str, Any]]:
    rows, columns = dice.randint(1, 9), dice.choice([64, 65, 200])
    levels = (torch.randn(rows, columns) * dice.choice([1, 5, 40])).clamp(-120, 120).to(torch.int8)
    steps, scales, chunk = torch.rand(columns) + 0.5, torch.rand(rows) + 0.5, dice.choice([2, 4])
    weight = planes.encode(levels, steps, scales, rows_per_chunk=chunk)
    return described(weight)


def described(weight: QuantizedWeight) -> tuple[Tensors, dict[str, Any]]:
    entries = {"up": QuantizedShape.of(weight).to_json()}
    return named_tensors("up", weight), Description.of_linears(entries).to_dict()


def escaping(dice: random.Random) -> tuple[Tensors, dict[str, Any]]:
    """Planes that are whole, of values that most layers pass on to the next one."""
    raw = dice.choice([0, 1, 2, 3])
    layers = tuple(dice.choice([1, 2, 3, 4]) for _ in range(dice.randint(1, 8)))
    if dice.random() < 0.3:
        raw, layers = dice.choice(CODES)
    rows, columns = dice.randint(1, 6), dice.choice([64, 100, 128])
    count, share, data = rows * -(-columns // 64) * 64, dice.choice([0.5, 0.9, 0.99, 1.0]), []
    for index, bits in enumerate(layers):
        size, named = -(-count // 64) * 64, (1 << bits) - 1
        escapes = np.random.rand(size) < share
        symbols = np.where(escapes, named, np.random.randint(0, 1 << bits, size)).astype(np.uint8)
        symbols[count:] = 0
        written = planes._planes(symbols, bits)
        if raw and index == 0:
            low = np.random.randint(0, 1 << raw, size).astype(np.uint8)
            low[:] = low if dice.random() < 0.5 else 0
            written = np.concatenate([written, planes._planes(low, raw)], axis=1)
        data.append(written.reshape(-1))
        count = int((symbols[:count] == named).sum())
    limit = 128 >> raw
    tops = np.random.randint(-limit if dice.random() < 0.5 else -3, limit, count).astype(np.int8)
    data.append(planes._padded(tops.view(np.uint8), 8))
    ones, content = torch.ones(128, dtype=torch.bfloat16), torch.from_numpy(np.concatenate(data))
    classes, code = torch.zeros(columns, dtype=torch.uint8), PlaneCode(raw, layers)
    parts = (content, classes, ones[:columns], ones[:rows], (code,), rows)
    return described(QuantizedWeight((rows, columns), *parts))


def damage(tensors: Tensors, config: dict[str, Any], dice: random.Random) -> Any:
    """Change bytes of a tensor, its length, or the description; returns the description."""
    if dice.random() < 0.2:
        return mutate_json(config, dice)
    name = dice.choice(sorted(tensors))
    tensor = tensors[name].clone()
    content = tensor.reshape(-1).view(torch.uint8)
    for _ in range(dice.choice([1, 1, 3, 20]) if len(content) else 0):
        at = dice.randrange(len(content))
        content[at] ^= dice.choice([1 << dice.randrange(8), 255, dice.randrange(256)])
    if dice.random() < 0.1:
        content.random_(256)
    if dice.random() < 0.1 and tensor.dim() == 1:
        tensor = tensor[: dice.randint(0, len(tensor))]
    tensors[name] = tensor
    return config


def answer(tensors: Tensors, config: Any) -> list[Any] | None:
    """The weights, and their rows one by one; None if they are refused."""
    try:
        description = Description.from_dict(config)
        description.check_tensors(tensors)
        weight, offsets = forms.checked_weight(description, next(iter(config["linears"])), tensors)
    except ValueError:
        return None
    dense = forms.expand(weight, None, offsets)
    rows = forms.expand_rows(weight, torch.arange(dense.shape[0]).flip(0), offsets, dense.dtype)
    if (kernels := library.load()) is not None:
        kernels.linear(torch.ones(2, dense.shape[1], dtype=dense.dtype), weight, offsets, None)
    return [dense.nan_to_num().tolist(), rows.flip(0).nan_to_num().tolist()]


def main() -> None:
    seed, cases = int(sys.argv[1]), int(sys.argv[2])
    torch.manual_seed(seed)
    np.random.seed(seed)
    every, outcomes = modes(), Counter()
    for number in range(cases):
        dice = random.Random(f"{seed} {number}")
        make = (bitmap, quantized, escaping)[number % 3]
        tensors, config = make(dice)
        if make is not escaping:
            config = damage(tensors, config, dice)
        answers = {}
        for mode in every:
            os.environ["PRUNUS_ISA"] = mode
            answers[mode] = answer(dict(tensors), config)
        for mode in every[1:]:
            assert answers[mode] == answers["off"], (number, make.__name__, mode, config)
        outcomes[f"{make.__name__} {'refused' if answers['off'] is None else 'fine'}"] += 1
    print(every)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
