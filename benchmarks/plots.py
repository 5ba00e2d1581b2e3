"""The plots and generated tables of the documentation, from the figures in docs/results/*.json.

    python benchmarks/plots.py                            plots and tables from the JSON files
    python benchmarks/plots.py --take OUT/results.json    first take the cells of a finished sweep

`--take` copies what was measured from the results of `prunus sweep examples/presets-curve.toml OUT`
into docs/results/curve.json, without paths. Cells that are not finished are left out, so the script
can run again while the sweep goes on.

Figures that the sweep does not have yet come from docs/results/patterns.json, which holds earlier
runs of the same code on the same processor. Times come from docs/results/times.json, which
benchmarks/run_times.py writes: a sweep measures time on the wall, with whatever else runs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from window_errors import mcnemar, ratio_and_error

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
#: The model of the proof that stands on the front page; smaller ones are a check.
LARGEST = "Qwen2.5-Coder-1.5B"
#: Files with tables between `<!-- table: NAME -->` and `<!-- end -->`.
WITH_TABLES = (ROOT / "docs" / "results" / "index.md",)
TEXT = "wikitext2"
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "python-code": "Python"}
#: Series of all plots, in the order of their loss: name in the JSON -> label and colour.
SERIES = {
    "magnitude": ("magnitude", "#8c8c8c"),
    "wanda": ("Wanda", "#d1495b"),
    "sparsegpt": ("SparseGPT", "#e0902f"),
    "balanced": ("balanced", "#3d85c6"),
    "best": ("best", "#1b7f4c"),
}
#: Points by which labels at the end of a curve move apart.
LABEL_SHIFT = {"balanced": 5, "best": -5}
CURVE = ("50 %", "60 %", "70 %")
PATTERNS = ("50 %", "60 %", "70 %", "4:8", "2:4")


@dataclass(frozen=True)
class Cell:
    """One run: perplexity, and processor seconds where they were measured."""

    perplexity: float
    seconds: float | None = None


@dataclass(frozen=True)
class Figures:
    """All that the plots and tables show: dense perplexity, and (series, pattern) -> cell."""

    dense: float
    cells: dict[tuple[str, str], Cell]

    def gap(self, series: str, pattern: str) -> float | None:
        """The residual gap: 1 is Wanda, 0 is lossless. None where a figure is missing."""
        cell, wanda = self.cells.get((series, pattern)), self.cells.get(("wanda", pattern))
        if cell is None or wanda is None:
            return None
        return (cell.perplexity - self.dense) / (wanda.perplexity - self.dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--take", type=Path, metavar="RESULTS.json", help="a finished sweep")
    options = parser.parse_args()
    if options.take is not None:
        take(options.take)
    figures = read_figures()
    write_plots(figures)
    for path in WITH_TABLES:
        path.write_text(with_tables(path.read_text(encoding="utf-8"), figures), encoding="utf-8")


# From a sweep to the repository.


def take(source: Path) -> None:
    """Keep what a sweep measured: dense score, and of each finished cell its figures and recipe."""
    sweep = json.loads(source.read_text(encoding="utf-8"))
    model = next(iter(sweep["models"].values()))
    kept = {
        "command": "prunus sweep examples/presets-curve.toml OUT",
        "title": sweep["title"],
        "model": next(iter(sweep["models"])),
        "fingerprint": model["fingerprint"],
        "hardware": sweep.get("hardware") or sweep["machine"],
        "versions": sweep["versions"],
        "scoring": sweep["scoring"],
        "dense": model["scores"],
        "cells": [kept_cell(cell) for cell in sweep["cells"] if cell["state"] == "done"],
    }
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / "curve.json").write_text(text, encoding="utf-8")


def kept_cell(cell: dict[str, Any]) -> dict[str, Any]:
    recipe = cell["recipe"]
    chosen = {
        key: recipe[key]
        for key in ("preset", "method", "sparsity", "pattern", "calibration", "samples", "seqlen")
    }
    return {
        "series": recipe["preset"] or recipe["method"],
        "pattern": pattern_of(recipe),
        "recipe": chosen | {"seed": recipe["seed"]},
        "pruning": cell["pruning"],
        "scores": cell["scores"],
    }


def pattern_of(recipe: dict[str, Any]) -> str:
    """The pattern as the tables name it: `2:4`, or a sparsity in per cent."""
    if recipe["pattern"] != "unstructured":
        return str(recipe["pattern"])
    return f"{round(100 * recipe['sparsity'])} %"


def read_figures() -> Figures:
    """The figures of curve.json, completed from patterns.json and times.json."""
    earlier, curve, times = (read(name) for name in ("patterns", "curve", "times"))
    perplexities = {
        (series, pattern): perplexity
        for series, row in earlier["perplexity"].items()
        for pattern, perplexity in row.items()
    }
    for cell in curve["cells"]:
        perplexities[cell["series"], cell["pattern"]] = cell["scores"][TEXT]["perplexity"]
    cells = {
        (series, pattern): Cell(perplexity, times["seconds"].get(series, {}).get(pattern))
        for (series, pattern), perplexity in perplexities.items()
    }
    return Figures(curve["dense"][TEXT]["perplexity"], cells)


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# Tables.


def with_tables(text: str, figures: Figures) -> str:
    """A page with each of its marked tables made anew."""

    def replaced(match: re.Match[str]) -> str:
        table = TABLES[match[1]](figures)
        return f"<!-- table: {match[1]} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def perplexity_table(figures: Figures) -> str:
    """Perplexity of every series at every pattern."""
    patterns = [p for p in PATTERNS if any(key[1] == p for key in figures.cells)]
    rows = [[label, *(perplexity(figures, name, p) for p in patterns)] for name, label in labels()]
    return markdown(["", *patterns], rows)


def time_table(figures: Figures) -> str:
    """Processor seconds of every series, for the patterns that were timed."""
    patterns = [p for p in PATTERNS if any(seconds(figures, name, p) for name in SERIES)]
    rows = [[label, *(seconds(figures, name, p) for p in patterns)] for name, label in labels()]
    rows = [row for row in rows if any(row[1:])]
    return markdown(["seconds", *patterns], rows)


def parts_table(_figures: Figures) -> str:
    """Seconds of the parts of runs, and the share of the speed of one large float32 product."""
    rows, names = [], ["all"]
    for model, runs in read("parts")["seconds"].items():
        for run, of_run in runs.items():
            parts, counts = of_run["parts"], of_run["operations"]
            parts["rest"] += of_run["all"] - sum(parts.values())
            names += [name for name in parts if name not in names]
            cells = {}
            for name, seconds in parts.items():
                share = counts.get(name, 0) / max(seconds, 1e-9) / of_run["speeds"]["float32"]
                cells[name] = f"{seconds:.1f}" + (f" ({share:.2f})" if share >= 0.005 else "")
            rows.append({"": f"{model}, {run}", "all": f"{of_run['all']:.0f}"} | cells)
    header = ["", *names]
    return markdown(header, [[row.get(name, "") for name in header] for row in rows])


def text_table(_figures: Figures) -> str:
    """KL divergence ± standard error and perplexity, of every method on every text."""
    rows = []
    for model, methods in read("models-and-texts")["cells"].items():
        first = next(iter(methods.values()))["texts"]
        rows.append([model, "dense", *(f"{first[text]['dense']:.2f}" for text in TEXTS)])
        for method, cell in methods.items():
            found = (cell["texts"][text] for text in TEXTS)
            scores = [f"{x['kl']:.3f} ± {x['kl_stderr']:.3f}, {x['perplexity']:.2f}" for x in found]
            rows.append(["", method, *scores])
    return markdown(["model", "method", *TEXTS.values()], rows, text=2)


#: Rows of proof.json, in the order of tables -> what people call them, and colour in plots.
PROOF_ROWS = {
    "preset": ("llama.cpp, importance matrix", SERIES["sparsegpt"][1]),
    "prunus types": ("prunus's types, llama.cpp's rounding", SERIES["magnitude"][1]),
    "its types": ("its types, prunus's rounding", SERIES["wanda"][1]),
    "nearest": ("prunus, rounded weight by weight", "#7d5ba6"),
    "prunus": ("prunus", SERIES["best"][1]),
    "fast": ("prunus, `--fast-on`", SERIES["wanda"][1]),
    "fixed head": ("prunus, embedding and head in Q6_K", SERIES["balanced"][1]),
    "autoround": ("AutoRound", "#b8860b"),
}


def decimals(value: float, least: int) -> int:
    """Decimals with which a positive number has three digits that count: from `least` to 6.

    llama.cpp prints six.

    >>> decimals(0.34859, 4), decimals(0.00198, 4), decimals(0.000055, 4)
    (4, 5, 6)
    """
    return min(6, max(least, 2 - math.floor(math.log10(value))))


def fixed(value: float, least: int) -> str:
    """A positive number as text, with the decimals that `decimals` says."""
    return f"{value:.{decimals(value, least)}f}"


def decoding_speed(row: dict[str, Any], field: str = "speeds") -> float:
    """Tokens per second, the median of the rounds; 0 where none was measured."""
    return statistics.median(speed["decode"] for speed in row[field]) if field in row else 0


def proof_table(_figures: Figures, largest: bool = True) -> str:
    """GGUF files at equal bytes: divergence, its ratio to that of the preset, and speed.

    Of the largest model, or of all others.
    """
    rows = []
    for model, measured in read("proof")["models"].items():
        if (model == LARGEST) is not largest:
            continue
        name = model
        for preset, of_preset in measured["rows"].items():
            for row in (x for x in PROOF_ROWS if x in of_preset):
                values, base = of_preset[row], of_preset["preset"]["scores"]
                cells = [
                    f"{fixed(x['kl'], 4)} ± {x['kl_stderr']:.{decimals(x['kl'], 4)}f}, "
                    f"{fixed(x['kl_99.9'], 2)}, "
                    f"{x['same_top']:.1f} %, **{x['kl'] / base[text]['kl']:.2f}**"
                    for text, x in values["scores"].items()
                ]
                decode = decoding_speed(values)
                size = [f"{values['bytes']:,}", f"{values['bits_of_linears']:.2f}"]
                speed = f"{decode:.1f}" if decode else ""
                rows.append([name, preset, PROOF_ROWS[row][0], *size, *cells, speed])
                name = ""
    columns = ["model", "size of", "file", "bytes", "bits", "WikiText-2", "Python", "tokens/s"]
    return markdown(columns, rows, text=3)


def windows_table(_figures: Figures) -> str:
    """By size and text: prunus beside the better of llama.cpp's files, with errors by window.

    The text with the largest ratio is the first. The last row of a size is HellaSwag.
    """
    rows = []
    for model, measured in read("proof-windows")["models"].items():
        name = model
        for preset, of_preset in measured["rows"].items():
            if "prunus" not in of_preset:
                continue
            found = [
                (text, [compared(measured["rows"], preset, text, field) for field in SCORES])
                for text in of_preset["prunus"].get("scores", {})
            ]
            for text, cells in sorted(found, key=lambda row: -row[1][0][0]):
                rows.append([name, preset, text, *(cell for _, *of in cells for cell in of)])
                name = ""
            if "hellaswag" in of_preset["prunus"]:
                rows.append([name, preset, "HellaSwag", *tasks_row(measured, preset)])
    columns = [f"{what}, {length}" for length in ("512", "2,048") for what in COMPARED]
    return markdown(["model", "size of", "text", *columns], rows, text=3)


#: Fields of proof-windows.json with chunks of 512 and of 2,048 tokens, and columns of each.
SCORES = ("scores", "long scores")
COMPARED = ("KL", "ratio, less floor", "perplexity, %")
#: llama.cpp's rows, of which the better one counts.
RIVALS = ("preset", "more tokens")


def lowest(of_preset: dict[str, Any], names: tuple[str, ...], text: str, field: str) -> Any:
    """The scores of the row that loses least, of those that have the text; None without one."""
    found = [of_preset.get(row, {}).get(field, {}).get(text) for row in names]
    return min(filter(None, found), key=lambda scores: scores["kl"], default=None)


def compared(rows: dict[str, Any], preset: str, text: str, field: str) -> tuple[Any, ...]:
    """A ratio of divergences, and the cells of a text in the order of `COMPARED`."""
    ours = lowest(rows[preset], ("prunus",), text, field)
    theirs = lowest(rows[preset], RIVALS, text, field)
    floor = lowest(rows["Q8_0"], ("preset",), text, field)
    if not (ours and theirs and floor):
        return 0.0, *[""] * len(COMPARED)
    files = ours, theirs
    values = [file["kl_by_window"] for file in files]
    ratio, error = ratio_and_error(*values)
    less, _ = ratio_and_error(*values, floor["kl_by_window"])
    rises = [100 * (file["perplexity"] / file["dense"] - 1) for file in files]
    return (
        ratio,
        ", ".join(fixed(file["kl"], 3) for file in files),
        f"**{ratio:.3f}** ± {error:.3f}, {less:.3f}",
        ", ".join(f"{rise:+.1f}" for rise in rises),
    )


def tasks_row(measured: dict[str, Any], preset: str) -> list[str]:
    """The cells of HellaSwag: per cent of tasks that are solved, and McNemar's test."""
    rows = measured["rows"][preset]
    ours, dense = rows["prunus"]["hellaswag"], measured["dense"]["hellaswag"]
    rivals = [rows[row]["hellaswag"] for row in RIVALS if "hellaswag" in rows.get(row, {})]
    theirs = max(rivals, key=by_solved)
    shares = [f"{100 * by_solved(solved) / len(solved):.1f} %" for solved in (ours, theirs, dense)]
    first, second, chance = mcnemar(ours, theirs)
    words = f"{shares[0]}, {shares[1]}; dense {shares[2]}"
    return [words, f"{first} to {second}, p = {chance:.2g}", *[""] * (2 * len(COMPARED) - 2)]


def by_solved(solved: str) -> int:
    return solved.count("1")


#: Results with files that decode fast -> the `--fast-on` of these files.
FAST = {"proof": "avx512", "proof-windows": "cpu"}


def fast_files() -> list[tuple[str, str, list[float], list[float]]]:
    """The largest model's files that decode fast, and others beside them.

    Returns:
        The preset of the same size, what the file is called, its speed with AVX-512 and with AVX2
        (as far as they were measured) and its divergence on each text, in units of the preset's.
    """
    files = []
    for source, given in FAST.items():
        for preset, of_preset in read(source)["models"][LARGEST]["rows"].items():
            base = of_preset["preset"]
            for row, name in (("prunus", "prunus"), ("fast", f"prunus, `--fast-on {given}`")):
                values = of_preset.get(row, {})
                if "speeds" not in values or "fast" not in of_preset:
                    continue
                speeds = [
                    decoding_speed(values, field) / decoding_speed(base, field)
                    for field in ("speeds", "speeds_avx2")
                    if field in values
                ]
                scores = values["scores"].items()
                losses = [x["kl"] / base["scores"][text]["kl"] for text, x in scores]
                files.append((preset, name, speeds, losses))
    return sorted(files, key=lambda file: file[0])


def speed_table(_figures: Figures) -> str:
    """Of files with types that decode fast: speed and divergence in units of the preset's."""
    rows = []
    for preset, name, speeds, losses in fast_files():
        decoded, lost = ([f"{x:.2f}" for x in ratios] for ratios in (speeds, losses))
        rows.append([preset, name, *decoded, *[""] * (2 - len(decoded)), *lost])
    return markdown(["size of", "file", "AVX-512", "AVX2", "WikiText-2", "Python"], rows, text=2)


TABLES = {
    "proof": proof_table,
    "sanity": partial(proof_table, largest=False),
    "proof-windows": windows_table,
    "speed": speed_table,
    "models-and-texts": text_table,
    "perplexity": perplexity_table,
    "time": time_table,
    "parts": parts_table,
}


def labels() -> list[tuple[str, str]]:
    return [(name, label) for name, (label, _) in SERIES.items()]


def perplexity(figures: Figures, series: str, pattern: str) -> str:
    cell = figures.cells.get((series, pattern))
    return "" if cell is None else f"{cell.perplexity:,.2f}"


def seconds(figures: Figures, series: str, pattern: str) -> str:
    cell = figures.cells.get((series, pattern))
    return "" if cell is None or cell.seconds is None else f"{cell.seconds:.0f}"


def markdown(header: list[str], rows: list[list[str]], text: int = 1) -> str:
    """A Markdown table; the first `text` columns are words, the others numbers."""
    marks = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


# Plots.


def write_plots(figures: Figures) -> None:
    """SVG files, the same bytes for the same figures."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {
        "svg.hashsalt": "prunus",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
    }
    plots = {"curve": draw_curve(figures), "gap": draw_gap(figures)}
    plots["models-and-texts"] = draw_texts(read("models-and-texts")["cells"])
    models = read("proof")["models"]
    plots["proof"] = draw_proof(models)
    plots["front"] = draw_proof({LARGEST: models[LARGEST]})
    for name, figure in plots.items():
        figure.savefig(
            RESULTS / f"{name}.svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight"
        )


def draw_curve(figures: Figures) -> Any:
    """Perplexity against sparsity, on a logarithmic axis."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    axes.axhline(figures.dense, color="black", linewidth=1, linestyle=":")
    axes.text(39.2, figures.dense * 0.97, f"dense {figures.dense:.1f}", va="top")
    for name, (label, color) in SERIES.items():
        points = [
            (float(pattern.split()[0]), figures.cells[name, pattern].perplexity)
            for pattern in CURVE
            if (name, pattern) in figures.cells
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=color, marker="o", markersize=4, linewidth=2)
            # Magnitude leaves the plot, so its label stands where it does.
            place, words = (
                ((58.5, 1900), f"{label}: {y[-1]:,.0f} at {x[-1]:.0f} %")
                if name == "magnitude"
                else ((x[-1], y[-1]), f"{label} {y[-1]:,.0f}")
            )
            axes.annotate(
                words,
                place,
                (7, LABEL_SHIFT.get(name, 0)),
                textcoords="offset points",
                color=color,
                va="center",
            )
    axes.set_yscale("log")
    axes.set_ylim(17, 2500)
    axes.set_yticks([20, 50, 100, 200, 500, 1000, 2000], [20, 50, 100, 200, 500, "1,000", "2,000"])
    axes.minorticks_off()
    axes.set_xticks([float(pattern.split()[0]) for pattern in CURVE], CURVE)
    axes.set_xlim(39, 79)
    axes.set_xlabel("weights removed")
    axes.set_ylabel("perplexity, WikiText-2 (log scale)")
    axes.set_title("SmolLM2-135M: what pruning costs", loc="left")
    return figure


def draw_gap(figures: Figures) -> Any:
    """The residual gap by pattern: bars of SparseGPT and the presets; Wanda is 1."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    names = ("sparsegpt", "balanced", "best")
    for place, name in enumerate(names):
        label, color = SERIES[name]
        bars = [
            (index + (place - 1) * 0.27, gap)
            for index, pattern in enumerate(PATTERNS)
            if (gap := figures.gap(name, pattern)) is not None
        ]
        x, y = zip(*bars, strict=True) if bars else ((), ())
        axes.bar(x, y, 0.25, color=color, label=label)
        for left, height in bars:
            axes.text(left, height + 0.01, f"{height:.2f}", ha="center", fontsize=8)
    axes.axhline(1, color=SERIES["wanda"][1], linewidth=1.5)
    axes.text(len(PATTERNS) - 0.45, 1.01, "Wanda", color=SERIES["wanda"][1], ha="right")
    axes.set_xticks(range(len(PATTERNS)), PATTERNS)
    axes.set_ylim(0, 1.25)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("residual gap (0 is lossless)")
    axes.set_title("What is lost, as a share of what Wanda loses", loc="left")
    axes.legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.02))
    return figure


def draw_texts(cells: dict[str, Any]) -> Any:
    """Bars of the KL divergence of every method, one group for each model and text."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.2 + 1.3 * len(TEXTS) * len(cells), 3.8))
    groups = [(model, text) for model in cells for text in TEXTS]
    colors = dict(SERIES.values()) | {"max": "#5fb98a"}
    methods = [label for label in colors if any(label in found for found in cells.values())]
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        measured = [at for at, (model, _) in enumerate(groups) if method in cells[model]]
        values = [cells[groups[at][0]][method]["texts"][groups[at][1]]["kl"] for at in measured]
        places = [at + (number + 0.5) * width - 0.4 for at in measured]
        axes.bar(places, values, 0.9 * width, color=colors[method], label=method)
    # The name of a model is below the middle one of its texts.
    middle = list(TEXTS)[len(TEXTS) // 2]
    names = [f"{TEXTS[text]}\n{model if text == middle else ''}" for model, text in groups]
    axes.set_xticks(range(len(groups)), names, fontsize=8)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("KL from the dense model, nats")
    axes.set_title("What each method loses, by text", loc="left")
    # Below the names, since bars of any height may be anywhere.
    axes.legend(frameon=False, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.5, -0.13))
    return figure


def name_points(axes: Any, sizes: Any, divergences: Any, names: Any) -> None:
    """Write names right of the points of a line, and left of them where the next one is close."""
    width, count = sizes[-1] - sizes[0], len(names)
    for at, (x, y, name) in enumerate(zip(sizes, divergences, names, strict=True)):
        # A point that is far above the next one has room on its right.
        is_close = (
            at + 1 < count and sizes[at + 1] - x < 0.08 * width and y < 2 * divergences[at + 1]
        )
        place, side = ((-4, -9), "right") if is_close else ((4, 4), "left")
        axes.annotate(name, (x, y), place, textcoords="offset points", fontsize=8, ha=side)


def draw_proof(models: dict[str, Any]) -> Any:
    """KL divergence against the bytes of GGUF files, a panel for each model and text.

    The largest model is the first.
    """
    import matplotlib.pyplot as plt

    models = dict(sorted(models.items(), key=lambda item: -item[1]["dense"]["bytes"]))
    texts = ("WikiText-2", "Python")
    figure, panels = plt.subplots(
        len(models), len(texts), figsize=(9.6, 2.9 * len(models)), squeeze=False
    )
    for panels_of_model, (model, measured) in zip(panels, models.items(), strict=True):
        for axes, text in zip(panels_of_model, texts, strict=True):
            for row in ("preset", "prunus types", "prunus"):
                points = sorted(
                    (of_preset[row]["bytes"] / 1e6, of_preset[row]["scores"][text]["kl"], preset)
                    for preset, of_preset in measured["rows"].items()
                    if row in of_preset
                )
                if not points:
                    continue
                sizes, divergences, presets = zip(*points, strict=True)
                label, color = PROOF_ROWS[row]
                axes.plot(sizes, divergences, "o-", color=color, markersize=4, label=label)
                if row == "preset":
                    name_points(axes, sizes, divergences, presets)
            axes.set_yscale("log")
            axes.margins(x=0.15, y=0.15)
            left, right = axes.get_xlim()
            if right - left < 0.1 * right:  # the files of one preset differ by a few kilobytes
                axes.set_xlim(0.8 * left, 1.2 * right)
            axes.set_title(f"{model}, {text}", loc="left")
        panels_of_model[0].set_ylabel("KL, nats (log scale)")
    for axes in panels[-1]:
        axes.set_xlabel("file, MB")
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    panels[0][0].legend(lines.values(), lines, frameon=False, loc="lower left", fontsize=8)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    main()
