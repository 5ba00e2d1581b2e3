"""Draws the pictures of docs/concepts as SVG: `python docs/tools/drawings.py` writes them again.

Each function below makes one picture. The table at the end names its file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from drawing import WIDTH, Drawing

FOLDER = Path(__file__).resolve().parent.parent / "concepts"


def lockstep() -> Drawing:
    """Three batches wait at gate and up while these are pruned."""
    draw = Drawing(
        400,
        "All batches of windows pause at one linear. It is pruned, and all continue.",
        "src/prunus/engine/block/walks.py",
    )
    columns = {"q, k, v": 170, "o": 300, "gate, up": 430, "down": 560}
    draw.box(430 - 58, 20, 116, 262, "pale")
    states = ["pruned", "pruned", "pruned now", "dense"]
    for (name, x), state in zip(columns.items(), states, strict=True):
        draw.text(x, 42, name, "bold")
        for place in range(36):
            zero = (place * 7 + place // 6 * 3) % 4 < 2
            style = {"pruned": "green", "pruned now": "orange", "dense": "blue"}[state]
            at = x - 30 + place % 6 * 10, 54 + place // 6 * 10
            draw.box(*at, 10, 10, "page" if zero and state != "dense" else style)
        draw.text(x, 136, state, "soft")
    for batch in range(3):
        y = 175 + 38 * batch
        draw.text(20, y + 5, f"batch {batch + 1}", "", "start")
        draw.line([(84, y), (424, y)])
        for x in (424, 432):
            draw.box(x, y - 10, 4, 20, "orange")
        draw.arrow((444, y), (630, y), "line dash")
        draw.text(640, y + 5, "output", "soft", "start")
    steps = [
        ("1. All batches wait here:", "the statistics are complete."),
        ("2. The method prunes", "the linear in place."),
        ("3. All batches continue with", "the pruned weight."),
    ]
    for number, lines in enumerate(steps):
        draw.named_box((20 + 233 * number, 304), (214, 56), lines)
        if number:
            draw.arrow((1 + 233 * number, 332), (20 + 233 * number, 332))
    return draw


def column_sweep() -> Drawing:
    """The sweep over a weight at column 4, and the row of U that corrects later columns."""
    draw = Drawing(
        410,
        "Column j is pruned. Row j of the Cholesky factor U spreads its error over later columns.",
        "src/prunus/methods/solvers/obs.py",
    )
    cell, now, rows = 25, 4, 8
    left, top = 30, 74
    for row in range(rows):
        for column in range(12):
            zero = (row * 5 + column * 3) % 7 < 3 and column <= now
            style = "green" if column < now else "orange" if column == now else "blue"
            draw.box(left + column * cell, top + row * cell, cell, cell, "page" if zero else style)
    draw.box(left, top, 12 * cell, rows * cell, "line")
    middle = left + (now + 0.5) * cell
    draw.text(left + 2 * cell, 58, "finished", "soft")
    draw.text(middle, 36, "column j")
    draw.arrow((middle, 42), (middle, top))
    draw.text(left + 8.7 * cell, 58, "corrected for each column", "soft")
    bottom = top + rows * cell + 18
    draw.arrow((middle, bottom), (left + 12 * cell, bottom))
    draw.text(left + 6 * cell, bottom + 24, "weight W: a row for each output")
    small, far, high = 17, 440, 58
    for row in range(12):
        for column in range(row, 12):
            style = "plain" if row != now else "orange" if column == now else "blue"
            draw.box(far + column * small, high + row * small, small, small, style)
    draw.text(far + 6 * small, 42, "U, where (G + λI)⁻¹ = UᵀU", "bold")
    draw.text(far - 8, high + (now + 0.8) * small, "row j", "", "end")
    draw.text(far + 4 * small, high + 10 * small, "G: Gram matrix", "soft")
    draw.text(far + 4 * small, high + 11 * small + 3, "of the inputs", "soft")
    draw.text(far + 6 * small, 292, "e = (w_j − ŵ_j) / U_jj", "bold")
    draw.text(far + 6 * small, 316, "w_k ← w_k − U_jk · e    for all k > j", "bold")
    notes = [
        "Within a tile of 16 columns, corrections are made one column at a time.",
        "All later columns are corrected by matrix products, for each tile and each block of 128.",
    ]
    for number, words in enumerate(notes):
        draw.text(WIDTH / 2, 350 + 20 * number, words, "soft")
    return draw


def _touching(draw: Drawing, curve: Callable[[float], float], at: float, style: str) -> None:
    """The straight line that touches a curve at one place, and the place."""
    slope = (curve(at + 0.5) - curve(at - 0.5)) / 1.0
    reach = 44 / (1 + slope**2) ** 0.5
    draw.line([(at - reach, curve(at) - slope * reach), (at + reach, curve(at) + slope * reach)])
    draw.add("circle", cx=float(at), cy=float(curve(at)), r=5, class_=style)


def _steps(start: float, stop: float, width: float) -> list[float]:
    count = int((stop - start) / width)
    return [start + width * number for number in range(count + 1)]


def allocation() -> Drawing:
    """The measurement of s by one backward pass, and equal slopes of loss over sparsity."""
    draw = Drawing(
        462,
        "A backward pass measures what errors of each linear cost. Sparsities are chosen where the "
        "loss curves of all linears have the same slope.",
        "src/prunus/rounding/loss_sensitivity.py, src/prunus/methods/allocation.py",
    )
    names = ["text", "block 0", "block 1", "block 2", "p"]
    for number, name in enumerate(names):
        ends = name in ("text", "p")
        x = 30 + 104 * number
        draw.named_box((x, 30), (66, 40), [name], "plain" if ends else "blue")
        if number:
            draw.arrow((x - 38, 42), (x, 42))
            if number > 1:
                draw.arrow((x, 60), (x - 38, 60), "line dash")
    draw.text(524, 46, "draw y from p, then run", "", "start")
    draw.text(524, 66, "back from log p(y)", "", "start")
    draw.text(290, 100, "at every linear, with outputs z: s_i = E[(∂ log p(y) / ∂z_i)²]", "bold")
    left, base = 70, 380
    draw.axes(left, base, 400, 240)
    draw.text(left + 8, 146, "loss: Σ s_i · w_ij² · E[x_j²] of removed weights", "soft", "start")
    # loss = size · sparsity³, so the slope is the same where size · sparsity² is.
    linears = [(0.32, "orange", "v", -8), (0.40, "green", "k", 8), (0.62, "blue", "q", 0)]
    for sparsity, style, name, side in linears:
        x = left + 400 * sparsity

        def curve(at: float, sparsity: float = sparsity) -> float:
            return base - 460 * ((at - left) / 400) ** 3 / sparsity**2 / 3

        stop = next(at for at in _steps(left, left + 400, 1) if curve(at) < 175 or at > left + 388)
        draw.line([(at, curve(at)) for at in _steps(left, stop, 4)], f"curve {style}")
        draw.line([(x, curve(x)), (x, base)], "line dash")
        _touching(draw, curve, x, style)
        draw.text(x + side, base + 18, f"{sparsity:.0%}".replace("%", " %"), "soft")
        draw.text(stop - 8, curve(stop) - 2, name, "bold", "end")
    draw.text(left + 400, base + 18, "sparsity", "soft")
    notes = [
        ("equal slopes:", "bold"),
        ("no exchange of weights", ""),
        ("lowers the sum", ""),
        ("v: errors are costly,", "soft"),
        ("so it keeps more", "soft"),
        ("q: errors cost little,", "soft"),
        ("so it keeps less", "soft"),
    ]
    for number, (words, style) in enumerate(notes):
        draw.text(
            520, 210 + 20 * number + 10 * (number > 2) + 10 * (number > 4), words, style, "start"
        )
    draw.text(
        WIDTH / 2,
        424,
        "The curves are a sketch. The sparsities are those of SmolLM2-135M at 50 %.",
        "soft",
    )
    return draw


def resume() -> Drawing:
    """How a block is committed, and what a second run finds after a kill."""
    draw = Drawing(
        420,
        "A shard is written under a temporary name, made durable, renamed and then recorded. A "
        "second run continues at the first block that is not recorded.",
        "src/prunus/engine/folder.py, src/prunus/model/checkpoint/files.py",
    )
    draw.text(20, 34, "Each block, in this order", "bold", "start")
    steps = [
        (["write the shard,", "temporary name"], "plain"),
        (["fsync: the data", "is on the disk"], "plain"),
        (["rename it,", "fsync the folder"], "plain"),
        (["the record", "names it"], "green"),
    ]
    for number, (words, style) in enumerate(steps):
        x = 20 + 175 * number
        draw.named_box((x, 48), (148, 54), words, style)
        if number:
            draw.arrow((x - 27, 75), (x, 75))
    draw.text(
        20,
        126,
        "A kill before the last step loses this block only. The index is written after all blocks.",
        "soft",
        "start",
    )
    rows = [
        ("first run", 160, ["made", "made", "killed", "", "", ""]),
        ("on disk", 226, ["shard, recorded", "shard, recorded", "temporary, file", "", "", ""]),
        ("second run", 292, ["read", "read", "made", "made", "made", "index"]),
    ]
    look = {"made": "green", "killed": "orange", "read": "blue", "index": "violet"}
    for name, y, cells in rows:
        draw.text(20, y + 27, name, "bold", "start")
        for number, words in enumerate(cells):
            x = 122 + 96 * number
            if words:
                style = look.get(words, "orange" if "temporary" in words else "plain")
                draw.named_box((x, y), (90, 44), words.split(", "), style)
    for number in range(5):
        draw.text(167 + 96 * number, 354, f"block {number}", "soft")
    draw.text(
        WIDTH / 2,
        380,
        "The windows run through finished blocks as stored, so the result has the same bytes.",
        "",
    )
    return draw


DRAWINGS = {
    "lockstep": lockstep,
    "column-sweep": column_sweep,
    "allocation": allocation,
    "resume": resume,
}


if __name__ == "__main__":
    for name, make in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(make().svg(), encoding="utf-8")
