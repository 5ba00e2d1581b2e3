"""The plots and generated tables of the documentation, from the figures in docs/results/*.json.

    python benchmarks/plots.py

`make results` does it too, after new figures.
"""

from __future__ import annotations

import math
import re
import statistics
from typing import Any

from figures import LIST, RESULTS, ROOT, VERSION, minor, read, source
from window_errors import mcnemar, ratio_and_error

#: The model of the proof that stands on the front page; smaller ones are a check.
LARGEST = "Qwen2.5-Coder-1.5B"
#: Files with tables between `<!-- table: NAME -->` and `<!-- end -->`.
WITH_TABLES = sorted({ROOT / page for each in LIST["results"].values() for page in each["pages"]})
#: Table -> its result.
RESULT_OF = {
    table: name for name, each in LIST["results"].items() for table in each.get("tables", [name])
}
TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "python-code": "Python"}
#: Series of all plots, in the order of their loss: name in the JSON -> label and colour.
SERIES = {
    "magnitude": ("magnitude", "#8c8c8c"),
    "wanda": ("Wanda", "#d1495b"),
    "sparsegpt": ("SparseGPT", "#e0902f"),
    "balanced": ("balanced", "#3d85c6"),
    "best": ("best", "#1b7f4c"),
    "trained": ("best, trained", "#5fb98a"),
}
#: Kind of a column -> its heading.
HEADS = {"minutes": "core minutes", "memory": "memory, GB"}
#: Kind of a column -> the field of a cell, and its unit.
UNITS = {"MB": ("bytes", 1e6), "minutes": ("core_minutes", 1), "memory": ("peak_memory", 1e9)}


def main() -> None:
    write_plots()
    for path in WITH_TABLES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


# Tables.


def with_tables(text: str) -> str:
    """A page with each of its marked tables made anew."""

    def replaced(match: re.Match[str]) -> str:
        name, result = match[1], RESULT_OF[match[1]]
        command = f"make results RESULTS={result}"
        if (RESULTS / f"{result}.json").exists():
            table = TABLES[name]() if name in TABLES else cell_table(result)
            table += f"\n\n{source(read(result), command)}"
        else:
            table = f"Not measured with version {minor(VERSION)} yet: `{command}`."
        return f"<!-- table: {name} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", replaced, text, flags=re.DOTALL)


def cell_table(name: str) -> str:
    """The table of a result of rows: by variants, and in each the columns that `show` names."""
    result = LIST["results"][name]
    variants, texts, show = result.get("variants", [""]), result["texts"], result["show"]
    columns = [
        (variant, kind, text)
        for variant in variants
        for kind in show
        for text in (texts if kind in ("kl", "perplexity") else [""])
    ]
    names_kind = {"kl", "perplexity"} <= set(show)
    heads = [
        variant
        or (f"{TEXTS[text]}, {kind}" if text and names_kind else "")
        or TEXTS.get(text, HEADS.get(kind, kind))
        for variant, kind, text in columns
    ]
    rows = []
    for model, cells in read(name)["cells"].items():
        found = list(cells.items())
        if "perplexity" in show:
            found.insert(0, ("dense", {v: dense(cell) for v, cell in found[0][1].items()}))
        for at, (row, measured) in enumerate(found):
            values = [shown(measured.get(v, {}), kind, text) for v, kind, text in columns]
            rows.append(["" if at else model, row, *values])
    return markdown(["model", "", *heads], rows, text=2)


def dense(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell with the perplexities of the dense model."""
    texts = cell["texts"].items()
    return {"texts": {text: {"perplexity": x["reference_perplexity"]} for text, x in texts}}


def shown(cell: dict[str, Any], kind: str, text: str) -> str:
    """One figure of a row as a table shows it; "" for one that was not measured."""
    scores = cell.get("texts", {}).get(text, {})
    if kind == "kl":
        return f"{scores['kl']:.3f} ± {scores['kl_stderr']:.3f}" if kind in scores else ""
    if kind == "perplexity":
        return f"{scores[kind]:.2f}" if kind in scores else ""
    field, unit = UNITS[kind]
    return f"{cell[field] / unit:.1f}" if field in cell else ""


def vision_table() -> str:
    """Top-1 accuracy of the image classifiers, by method, group and sparsity, in per cent."""
    figures = read("vision")
    rows = []
    for kind, ways in figures["accuracy"].items():
        whole, name = f"{100 * ways.pop('dense'):.1f}", kind
        for way, shares in ways.items():
            rows.append([name, way, whole, *(f"{100 * share:.1f}" for share in shares.values())])
            name = ""
    return markdown(["model", "", "dense", *figures["sparsities"]], rows, text=2)


def sizes_table() -> str:
    """Times of the presets of compress on one core by size of the model; bold ones are measured."""
    rows = []
    for size, cell in read("sizes")["cells"].items():
        presets = cell["presets"]
        times = [
            f"**{minutes(preset['core_minutes'])}**"
            if "core_minutes" in preset
            else minutes(preset["forecast_minutes"])
            for preset in presets.values()
        ]
        rows.append([size, *times, f"{cell['forecast_memory'] / 1e9:.1f}"])
    return markdown(["parameters", *presets, "memory, GB"], rows, text=1)


def minutes(number: float) -> str:
    """Minutes for people."""
    if number < 99.5:
        return f"{number:.2g} min"
    return f"{number / 60:.2g} h" if number < 48 * 60 else f"{number / 1440:.2g} days"


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


def proof_table() -> str:
    """GGUF files of the largest model: divergence, its ratio to that of the preset, and speed."""
    rows = []
    for preset, of_preset in read("proof")["models"][LARGEST]["rows"].items():
        for row in (x for x in PROOF_ROWS if x in of_preset):
            values, base = of_preset[row], of_preset["preset"]["scores"]
            cells = [
                f"{fixed(x['kl'], 4)}, **{x['kl'] / base[text]['kl']:.2f}**"
                for text, x in values["scores"].items()
            ]
            decode = decoding_speed(values)
            size = f"{values['bytes'] / 1e6:.1f}"
            rows.append(
                [preset, PROOF_ROWS[row][0], size, *cells, f"{decode:.0f}" if decode else ""]
            )
    columns = ["size of", "file", "MB", "WikiText-2", "Python", "tokens/s"]
    return markdown(columns, rows, text=2)


def front_table() -> str:
    """The rows of the front page: the largest model at four sizes, on prose."""
    rows = []
    models = read("proof")["models"][LARGEST]["rows"]
    for preset in ("IQ2_M", "Q2_K", "Q3_K_M", "Q4_K_M"):
        theirs, ours = (models[preset][row]["scores"]["WikiText-2"] for row in ("preset", "prunus"))
        size = f"{models[preset]['prunus']['bytes'] / 1e6:.0f} MB ({preset})"
        losses = [f"{x['kl']:.3f}" for x in (theirs, ours)]
        words = f"{ours['same_top']:.0f} % of next words as before, not {theirs['same_top']:.0f} %"
        rows.append([size, *losses, words])
    return markdown(["file", "llama.cpp loses", "prunus loses", "what it means"], rows)


#: Fields of proof-windows.json -> the length of their windows.
SCORES = {"scores": "512", "long scores": "2,048"}
#: llama.cpp's rows, of which the better one counts.
RIVALS = ("preset", "more tokens")


def lowest(of_preset: dict[str, Any], names: tuple[str, ...], text: str, field: str) -> Any:
    """The scores of the row that loses least, of those that have the text; None without one."""
    found = [of_preset.get(row, {}).get(field, {}).get(text) for row in names]
    return min(filter(None, found), key=lambda scores: scores["kl"], default=None)


def compared(rows: dict[str, Any], preset: str, text: str, field: str) -> tuple[float, float]:
    """The ratio of prunus's divergence to llama.cpp's, and its error over windows."""
    files = (lowest(rows[preset], names, text, field) for names in (("prunus",), RIVALS))
    ratio, error = ratio_and_error(*(file["kl_by_window"] for file in files))
    return float(ratio), float(error)


def tasks_table() -> str:
    """HellaSwag: per cent of tasks that are solved, and McNemar's test."""
    rows = []
    for model, measured in read("proof-windows")["models"].items():
        dense, name = measured["dense"].get("hellaswag"), model
        for preset, of_preset in measured["rows"].items():
            ours = of_preset.get("prunus", {}).get("hellaswag")
            if ours is None:
                continue
            theirs = of_preset["preset"]["hellaswag"]
            shares = [100 * x.count("1") / len(x) for x in (dense, theirs, ours)]
            chance = mcnemar(ours, theirs)[2]
            rows.append([name, preset, *(f"{x:.1f}" for x in shares), f"{chance:.2g}"])
            name = ""
    return markdown(["model", "size of", "dense", "llama.cpp", "prunus", "p"], rows, text=2)


def fast_files() -> list[tuple[str, str, list[float], list[float]]]:
    """The largest model's files that decode fast, and others beside them.

    Returns:
        The preset of the same size, what the file is called, its speed with AVX-512 and with AVX2
        (as far as they were measured) and its divergence on each text, in units of the preset's.
    """
    files = []
    for found in (read("proof"), read("proof-windows")):
        given = found["fast_on"]
        for preset, of_preset in found["models"][LARGEST]["rows"].items():
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


def speed_table() -> str:
    """Of files with types that decode fast: speed and divergence in units of the preset's."""
    rows = []
    for preset, name, speeds, losses in fast_files():
        decoded, lost = ([f"{x:.2f}" for x in ratios] for ratios in (speeds, losses))
        rows.append([preset, name, *decoded, *[""] * (2 - len(decoded)), *lost])
    return markdown(["size of", "file", "AVX-512", "AVX2", "WikiText-2", "Python"], rows, text=2)


TABLES = {
    "front": front_table,
    "proof": proof_table,
    "sizes": sizes_table,
    "speed": speed_table,
    "tasks": tasks_table,
    "vision": vision_table,
}


def markdown(header: list[str], rows: list[list[str]], text: int = 1) -> str:
    """A Markdown table; the first `text` columns are words, the others numbers."""
    marks = ["---"] * text + ["---:"] * (len(header) - text)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


# Plots.


def write_plots() -> None:
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
    models = read("proof")["models"]
    plots = {
        "methods": draw_texts(read("methods")["cells"]),
        "proof": draw_proof(models),
        "front": draw_proof({LARGEST: models[LARGEST]}),
        "ratios": draw_ratios(read("proof-windows")["models"]),
    }
    for name, figure in plots.items():
        figure.savefig(
            RESULTS / f"{name}.svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight"
        )


def draw_texts(cells: dict[str, Any]) -> Any:
    """Bars of the KL divergence of every method, one group for each model and text."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(1.2 + 1.3 * len(TEXTS) * len(cells), 3.8))
    groups = [(model, text) for model in cells for text in TEXTS]
    colors = dict(SERIES.values())
    methods = [label for label in colors if any(label in found for found in cells.values())]
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        measured = [at for at, (model, _) in enumerate(groups) if method in cells[model]]
        values = [cells[groups[at][0]][method][""]["texts"][groups[at][1]]["kl"] for at in measured]
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


def draw_ratios(models: dict[str, Any]) -> Any:
    """The loss of prunus's file in units of llama.cpp's: a panel per size, a group per model."""
    import matplotlib.pyplot as plt

    presets, shapes = ("Q2_K", "Q4_K_M"), dict(zip(SCORES, "os", strict=True))
    figure, panels = plt.subplots(1, len(presets), figsize=(9.6, 4.6), sharex=True)
    for axes, preset in zip(panels, presets, strict=True):
        names = []
        for model, measured in models.items():
            texts = measured["rows"][preset]["prunus"]["scores"]
            found = {
                text: {field: compared(measured["rows"], preset, text, field) for field in SCORES}
                for text in texts
            }
            for text in sorted(found, key=lambda text: -found[text]["scores"][0]):
                for shift, (field, (ratio, error)) in zip(
                    (0.15, -0.15), found[text].items(), strict=True
                ):
                    color = SERIES["best" if field == "scores" else "balanced"][1]
                    label = f"windows of {SCORES[field]} tokens"
                    axes.errorbar(
                        ratio, len(names) + shift, xerr=error, fmt=shapes[field], color=color,
                        markersize=4, capsize=2, label=label,
                    )  # fmt: skip
                names.append(f"{model}: {text}")
            if model != list(models)[-1]:
                axes.axhline(len(names) - 0.5, color="#8c8c8c", linewidth=0.5)
        axes.axvline(1, color=SERIES["sparsegpt"][1], linewidth=1.5)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.05)
        axes.set_xlabel("loss of prunus's file / loss of llama.cpp's")
        axes.set_title(f"at the size of {preset}", loc="left")
    lines, words = panels[0].get_legend_handles_labels()
    found = dict(zip(words, lines, strict=True))
    figure.legend(found.values(), found, frameon=False, loc="lower center", ncols=2, fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


if __name__ == "__main__":
    main()
