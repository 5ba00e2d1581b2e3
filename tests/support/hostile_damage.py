"""Random damage to files, for `hostile.py` and its kinds of inputs."""

import json
import random
import struct
from pathlib import Path
from typing import Any

NUMBERS = [
    *(-1, 0, 1, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53),
    *(2**62, 2**63 - 1, 2**64 - 1, -(2**63), 10**30),
]
VALUES: list[Any] = [
    *(None, True, "", "x", "../x", "/etc/passwd", "\0", "é" * 99, 0.5, -1.5, 1e300),
    *([], [0], {}, {"a": 1}, [[]] * 3, "auto", *NUMBERS),
]


def mutate_json(value: Any, dice: random.Random) -> Any:
    value = json.loads(json.dumps(value))
    parent, key = None, None
    node = value
    while isinstance(node, dict | list) and node and (parent is None or dice.random() < 0.8):
        parent = node
        key = dice.choice(list(node)) if isinstance(node, dict) else dice.randrange(len(node))
        node = node[key]
    if parent is None:
        return dice.choice(VALUES)
    kind = dice.random()
    if kind < 0.15:
        del parent[key]
    elif kind < 0.3 and isinstance(parent, dict):
        parent[str(key) + dice.choice(["x", "/", ".weight", "\0", ".."])] = parent.pop(key)
    elif kind < 0.5 and isinstance(node, int) and not isinstance(node, bool):
        parent[key] = node + dice.choice([-1, 1, 8, node, 10 * node, -2 * node])
    else:
        parent[key] = dice.choice(VALUES)
    return value


def mutate_bytes(data: bytes, dice: random.Random, until: int) -> bytes:
    """`data` with a few random changes before byte `until`.

    A change overwrites a byte or a number, removes or inserts some bytes, or cuts off the end.
    """
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(min(until, len(data)) or 1)
        kind = dice.random()
        if kind < 0.4:
            data[at : at + 1] = bytes([dice.randrange(256)])
        elif kind < 0.6:
            data[at : at + 8] = struct.pack("<Q", dice.choice(NUMBERS) % 2**64)
        elif kind < 0.75:
            data[at : at + 4] = struct.pack("<I", dice.choice(NUMBERS) % 2**32)
        elif kind < 0.85:
            del data[at : at + dice.randrange(1, 40)]
        elif kind < 0.95:
            data[at:at] = bytes(dice.randrange(1, 40))
        else:
            del data[at:]
    return bytes(data)


def damage_header(path: Path, dice: random.Random) -> None:
    """Change the JSON at the head of a safetensors file, or the bytes around it."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if dice.random() < 0.5:
        path.write_bytes(mutate_bytes(data, dice, 8 + length))
        return
    header = json.loads(data[8 : 8 + length])
    if dice.random() < 0.4:
        _disagree(header, dice)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        return
    for _ in range(dice.choice((1, 1, 2))):
        header = mutate_json(header, dice)
    text = json.dumps(header).encode()
    stated = len(text) if dice.random() < 0.9 else dice.choice(NUMBERS) % 2**64
    path.write_bytes(struct.pack("<Q", stated) + text + data[8 + length :])


def _disagree(header: dict[str, Any], dice: random.Random) -> None:
    """Make a header wrong but valid in itself: it describes the same bytes in another way."""
    one, other = dice.sample([name for name in header if name != "__metadata__"], 2)
    kind = dice.randrange(5)
    if kind == 0:
        header[one], header[other] = header[other], header[one]
    elif kind == 1:
        same = {
            "F32": ["I32", "U32"],
            "BF16": ["F16", "I16", "U16"],
            "U8": ["I8", "BOOL", "F8_E4M3"],
        }
        header[one]["dtype"] = dice.choice(same.get(header[one]["dtype"], ["F64"]))
    elif kind == 2:
        header[one]["shape"] = dice.choice(
            [header[one]["shape"][::-1], [1, *header[one]["shape"]], [-1]]
        )
    elif kind == 3:
        header[one + dice.choice(["x", "/../x", "\0", "." * 50])] = header.pop(one)
    else:
        del header[dice.choice((one, "__metadata__"))]


def damage_json(path: Path, dice: random.Random) -> None:
    if dice.random() < 0.15:
        path.write_bytes(mutate_bytes(path.read_bytes(), dice, 10**9))
        return
    content = json.loads(path.read_text())
    for _ in range(dice.choice((1, 1, 2, 3))):
        content = mutate_json(content, dice)
    path.write_text(json.dumps(content))
