"""Tables in markdown, and a plot, from what throughput.py has measured.

usage: python benchmarks/throughput_table.py [benchmarks/results/throughput-cpu.json ...] [--plot throughput.png]

Without a file, those of both devices are looked for; what has no results "was not measured".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command import read_results, save_figure, table_parser
from machine import in_words

OURS, THEIRS, BASE = "#0a7d5a", "#6e6e73", "#1d1d1f"
BAR, WIDTH = 0.19, 7.2  # inches


def tables(results: dict[str, Any]) -> str:
    """One table for each run, after what it ran on."""
    lines = [in_words(results)]
    for run in results["runs"]:
        lines += ["", f"**{heading(run)}**", "", noise_of(run), ""]
        lines += ["| | throughput over the base | ms | images/s | peak memory | error of maps |", "|---|---|---|---|---|---|"]
        lines += [row_of(c, run["cases"]) for c in run["cases"]]
    return "\n".join(lines)


def heading(run: dict[str, Any]) -> str:
    filled = ", which fills the device" if run["fills_the_device"] else ""
    size = f"{run['image_size']} x {run['image_size']}"
    return f"{run['model']}, {size}, {run['dtype']}, {run['mode']}, batch {run['batch']}{filled}"


def noise_of(run: dict[str, Any]) -> str:
    """How many rounds, and what the base makes of itself."""
    again = next((c.get("throughput_over_base") for c in run["cases"] if c["case"] == "fused_again"), None)
    same = f"; the base over itself {ratio(again)}" if again else ""
    load = run["load_average"]
    turns = "each case right after its base" if run.get("pairs") else "in turns"
    return f"{run['rounds']} rounds, {turns}{same}; load of the machine {load['before']:.1f} to {load['after']:.1f}."


def row_of(case: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """A line of the table: figures, or the reason why there are none."""
    title = case["title"]
    if "seconds" not in case:
        reason = case["verdict"].removeprefix("not here: ").replace("|", "/")
        return f"| {title} | not measured: {reason} | | | | |"
    time = case["seconds"]
    base = next(c["title"] for c in cases if c["case"] == case["base"])
    over = "base" if case["case"] == case["base"] else ratio(case["throughput_over_base"])
    over += f" of {base}" if case["base"] != "fused" and case["case"] != case["base"] else ""
    seconds = f"{1e3 * time['median']:.4g} ± {1e3 * time['mad']:.2g}"
    error = "" if case["error"] is None else f"{case['error']:.0e}"
    return (
        f"| {title} | {over} | {seconds} | {case['images_per_second']:.4g} | {case['peak_bytes'] / 2**20:.4g} MiB | {error} |"
    )


def ratio(spread: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{spread['median']:.2f} ({spread['q1']:.2f} to {spread['q3']:.2f})"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each run: the median of each case over its base, its quartiles as a line."""
    from matplotlib.figure import Figure

    runs = [run for found in results for run in found["runs"]]
    widest = 1.05 * max(c["throughput_over_base"]["q3"] for run in runs for c in run["cases"] if c.get("throughput_over_base"))
    shown = [[c for c in run["cases"] if c.get("throughput_over_base") and c["case"] != c["base"]] for run in runs]
    heights = [BAR * (len(cases) + 3) for cases in shown]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, run, cases in zip(panels, runs, shown):
        draw_cases(axes, cases)
        axes.set_xlim(0.0, widest)
        axes.set_title(heading(run), fontsize=7, loc="left")
    panels[-1].set_xlabel("throughput over the base of the same round: median and quartiles", fontsize=6)
    save_figure(figure, path)


def draw_cases(axes: Any, cases: list[dict[str, Any]]) -> None:
    """A line for each case, from one quartile to the other, and a dot at the median."""
    for place, case in enumerate(cases):
        spread, colour = case["throughput_over_base"], colour_of(case)
        quartiles = [spread["q1"], spread["q3"]]
        axes.plot(quartiles, [place, place], color=colour, linewidth=3, alpha=0.35, solid_capstyle="round")
        axes.plot(spread["median"], place, "o", color=colour, markersize=4)
    axes.set_yticks(range(len(cases)), [c["title"] for c in cases], fontsize=6)
    axes.axvline(1.0, color=BASE, linewidth=0.6)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=6)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def colour_of(case: dict[str, Any]) -> str:
    return THEIRS if case["peer"] else BASE if case["case"] == "fused_again" else OURS


def main() -> None:
    options = table_parser(__doc__).parse_args()
    found = read_results("throughput", options.results)
    for name, results in found.items():
        print(f"\n{tables(results)}" if results else f"\nOn {name}: not measured.")
    if options.plot and any(found.values()):
        plot([results for results in found.values() if results], options.plot)


if __name__ == "__main__":
    main()
