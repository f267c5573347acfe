"""PNG plots of a result. matplotlib is imported when one is drawn, and needs no display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddpm_fast.scaling.report import PARTS, mode_rows
from ddpm_fast.scaling.result import rank_word

COLOURS = {"weak": "#1f77b4", "strong": "#d62728"}


def draw_plots(result: dict[str, Any], folder: Path) -> list[Path]:
    """The plots that the result has data for; ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plots = {"throughput": _throughput, "efficiency": _efficiency, "step_split": _split,
             "memory": _memory}  # fmt: skip
    paths = []
    for name, draw in plots.items():
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2), dpi=110)
        if draw(result, axes):
            axes.set_title(axes.get_title() + _label(result), fontsize=10)
            figure.tight_layout()
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1])
        pyplot.close(figure)
    return paths


def _label(result: dict[str, Any]) -> str:
    if result["kind"] == "gpu":
        return f" ({result['preset']}, {result['precision']})"
    return f" ({result['preset']}, CPU processes, not GPUs)"


def _lines(result: dict[str, Any], axes: Any, key: str) -> bool:
    """Measured points joined, predicted ones hollow and dashed; whether there are any."""
    for mode, colour in COLOURS.items():
        rows = mode_rows(result, mode)
        ahead = [row for row in result["predicted"] if row["mode"] == mode]
        if not rows or (mode == "strong" and len(rows) == 1 and not ahead):
            continue
        x, y = [r["world_size"] for r in rows], [r[key] for r in rows]
        axes.plot(x, y, "o-", color=colour, label=f"{mode}, measured")
        if ahead:
            axes.plot([x[-1], *(r["world_size"] for r in ahead)],
                      [y[-1], *(r[key] for r in ahead)], "o--", color=colour,
                      markerfacecolor="white", markevery=slice(1, None), zorder=1,
                      label=f"{mode}, PREDICTED")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(f"number of {'GPUs' if rank_word(result) == 'GPU' else 'CPU processes'}")
    axes.grid(alpha=0.3)
    return bool(result["rows"])


def _throughput(result: dict[str, Any], axes: Any) -> bool:
    if not _lines(result, axes, "images_per_s"):
        return False
    base = mode_rows(result, "weak")[0]
    sizes = [row["world_size"] for row in [*result["rows"], *result["predicted"]]]
    ideal = [base["images_per_s"] / base["world_size"] * n for n in (min(sizes), max(sizes))]
    axes.plot([min(sizes), max(sizes)], ideal, ":", color="grey", label="ideal")
    for row in result["rows"]:
        axes.vlines(row["world_size"], row["images_per_s_low"], row["images_per_s_high"],
                    color=COLOURS[row["mode"]])  # fmt: skip
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("images/s")
    axes.set_title("Throughput")
    axes.legend(fontsize=8)
    return True


def _efficiency(result: dict[str, Any], axes: Any) -> bool:
    if not _lines(result, axes, "efficiency"):
        return False
    axes.axhline(1, linestyle=":", color="grey", label="ideal")
    axes.set_ylim(0, max(1.1, *(1.1 * row["efficiency"] for row in result["rows"])))
    axes.set_ylabel("efficiency")
    axes.set_title("Efficiency")
    axes.legend(fontsize=8)
    return True


def _split(result: dict[str, Any], axes: Any) -> bool:
    """Stacked bars of a step; overlapped communication, which takes no time of it, is left out."""
    rows = result["rows"]
    names = [f"{row['world_size']}\n{row['mode']}" for row in rows]
    bottom = [0.0] * len(rows)
    for part, name in PARTS.items():
        if part == "overlapped_communication":
            continue
        heights = [row["split_ms"][part] for row in rows]
        label = "exposed communication" if part == "exposed_communication" else name
        axes.bar(names, heights, bottom=bottom, label=label, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("ms a step")
    axes.set_title("A step's time")
    if rows:
        axes.legend(fontsize=8)
    return bool(rows)


def _memory(result: dict[str, Any], axes: Any) -> bool:
    samples = [s for s in result["samples"] if s["memory_gib"] is not None]
    for device in sorted({s["device"] for s in samples}):
        own = [s for s in samples if s["device"] == device]
        axes.plot([s["seconds"] for s in own], [s["memory_gib"] for s in own], label=device)
    axes.set_xlabel("seconds")
    axes.set_ylabel("GiB in use")
    axes.set_title("Memory over time")
    axes.grid(alpha=0.3)
    if samples:
        axes.legend(fontsize=8)
    return bool(samples)
