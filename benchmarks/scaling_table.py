"""Tables in markdown, and a plot, from what scaling.py has measured.

usage: python benchmarks/scaling_table.py [benchmarks/results/scaling-cpu.json ...] [--sweeps tokens] [--plot scaling.png]

Without a file, those of both devices are looked for; what has no results "was not measured".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command import read_results, save_figure, table_parser
from machine import in_words

INK, FAINT = "#1d1d1f", "#6e6e73"
DRAWN = {  # reading: colour, marker, and what is written beside its line
    "forward": (INK, "o", "fused forward"),
    "all_maps": ("#c2410c", "s", "all maps"),
    "one_head": ("#d99a0b", "D", "one head"),
    "entropy": ("#7048b6", "^", "entropy"),
    "received": ("#2b6cb0", "v", "received"),
    "class_rows": ("#0a7d5a", "o", "first token's rows"),
}
DASHES = (4, 3)
End = tuple[int, float, str, str]
"""Where a line ends, its name and its colour."""
HEAD = ["time over the forward", "ms", "peak memory, MB", "operations, 10⁹", "bytes, 10⁶", "limit, ms", "of the limit"]


def tables(results: dict[str, Any], wanted: list[str]) -> str:
    """For each run what it ran on, what it found at most tokens, and a table for each sweep that is wanted."""
    lines = [in_words(results)]
    for run in results["runs"]:
        load, peaks = run["load_average"], run["peaks"]
        lines += ["", f"**{run['dtype']}, width {run['width']}, {run['heads']} heads**", "", run["stated"], ""]
        lines += [f"Peaks: {peak_words(peaks)}; load of the machine {load['before']:.1f} to {load['after']:.1f}."]
        for sweep in dict.fromkeys(p["sweep"] for p in run["points"] if p["sweep"] in wanted):
            lines += ["", *table([p for p in run["points"] if p["sweep"] == sweep], sweep)]
    return "\n".join(lines)


def peak_words(peaks: dict[str, Any]) -> str:
    """The best of both, and what each was before and after."""

    def words(kind: str, unit: str) -> str:
        best, before, after = (p and p[f"{kind}_per_second"] / 1e9 for p in (peaks, peaks["before"], peaks["after"]))
        return f"{best:.4g} {unit} ({before:.4g} before, {after:.4g} after)" if after else f"{best:.4g} {unit} (before)"

    return f"{words('operations', '10⁹ operations/s')}, {words('bytes', 'GB/s')}"


def table(points: list[dict[str, Any]], sweep: str) -> list[str]:
    """All points of a sweep, by what is read; what is not there at any of them is said once."""
    fixed = {k: v for k, v in fixed_of(points).items() if k not in (sweep, "width")}
    given = ", ".join(f"{v:,} {k}" if k != "batch" else f"batch {v}" for k, v in fixed.items() if v)
    lines = [f"By {sweep} ({given}):", "", f"| | {sweep} | {' | '.join(HEAD)} |", "|---" * (len(HEAD) + 2) + "|"]
    absent = {}
    for title in dict.fromkeys(p["title"] for p in points):
        rows = [p for p in points if p["title"] == title]
        if all(p["verdict"].startswith("not here") for p in rows):
            absent[title] = rows[0]["verdict"]
        else:
            lines += [f"| {title} | {p[sweep]:,} | {cells(p)} |" for p in rows]
    return lines + [line for title, why in absent.items() for line in ("", f"{title}: {why}.")]


def fixed_of(points: list[dict[str, Any]]) -> dict[str, int]:
    """The sizes that all points share."""
    keys = ("tokens", "width", "heads", "layers", "batch")
    return {k: points[0][k] for k in keys if len({p[k] for p in points}) == 1}


def cells(p: dict[str, Any]) -> str:
    """Figures, or the reason why there are none; what is counted stands in either case."""
    counted = f"{digits(p['operations'] / 1e9)} | {digits(p['bytes'] / 1e6)} | {digits(1e3 * p['limit_seconds'])}"
    if "seconds" not in p:
        return f"{p['verdict'].replace('|', '/')} | | | {counted} | "
    time, over = p["seconds"], p.get("over_forward")
    ratio = f"{over['median']:.3g} ({over['q1']:.3g} to {over['q3']:.3g})" if over else ""
    ratio = "base" if p["reading"] == "forward" else ratio
    deviation = f"± {digits(1e3 * time['mad'], 2)}" if time["n"] > 1 else "(once)"
    seconds = f"{digits(1e3 * time['median'])} {deviation}"
    return f"{ratio} | {seconds} | {digits(p['peak_bytes'] / 1e6)} | {counted} | {digits(p['of_the_limit'], 2)}"


def digits(value: float, count: int = 3) -> str:
    """So many significant digits, and all that stand before the point."""
    return f"{value:,.0f}" if value >= 10**count else f"{value:.{count}g}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and peak memory over tokens, a row for each dtype: measured as lines, the least as dashes of the same colour."""
    from matplotlib.figure import Figure

    runs = [(run, [p for p in run["points"] if p["sweep"] == "tokens"]) for run in results["runs"]]
    runs = [(run, points) for run, points in runs if points]
    figure = Figure(figsize=(11, 4.9 * len(runs)), dpi=160, layout="constrained", facecolor="white")
    panels = figure.subplots(len(runs), 2, squeeze=False)
    ends = []
    for (left, right), (run, points) in zip(panels, runs):
        maps = {p["tokens"]: 4 * p["heads"] * p["tokens"] ** 2 / 1e6 for p in points}
        right.plot(list(maps), list(maps.values()), color=FAINT, linewidth=1, dashes=DASHES)
        timed = drawn(left, points, lambda p: 1e3 * p["seconds"]["median"], lambda p: 1e3 * p["limit_seconds"])
        held = drawn(right, points, lambda p: p["peak_bytes"] / 1e6)
        ends += [(left, timed), (right, [*held, (*list(maps.items())[-1], "N x N of all heads", FAINT)])]
        style: dict[str, Any] = {"fontsize": 9.5, "loc": "left", "color": INK, "pad": 10}
        left.set_title(f"Time in ms, {run['dtype']}; dashed: the least for its operations and bytes", **style)
        right.set_title("Peak memory in MB, above what was held before", **style)
    machine, first = results["machine"], runs[0][0]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['torch_threads']} of {machine['cores']} cores"
    title = f"Reading one attention module on {where}: width {first['width']}, {first['heads']} heads, batch 1"
    figure.suptitle(title, fontsize=11, color=INK)
    figure.draw_without_rendering()  # places the panels
    for axes, names in ends:
        name_lines(axes, names)
    save_figure(figure, path)


def drawn(axes: Any, points: list[dict[str, Any]], measured: Any, least: Any = None) -> list[End]:
    """The readings on logarithmic axes, and where their lines end."""
    ends = []
    for reading, (colour, marker, name) in DRAWN.items():
        rows = [p for p in points if p["reading"] == reading and "seconds" in p]
        if rows:
            tokens = [p["tokens"] for p in rows]
            axes.plot(tokens, [measured(p) for p in rows], color=colour, marker=marker, markersize=4, linewidth=1.6)
            if least:
                axes.plot(tokens, [least(p) for p in rows], color=colour, linewidth=1, dashes=DASHES, alpha=0.75)
            ends.append((tokens[-1], measured(rows[-1]), name, colour))
    shown = sorted({p["tokens"] for p in points})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.margins(y=0.08)
    axes.set_xticks(shown, [f"{n:,}" for n in shown])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.set_xlim(shown[0] / 1.3, shown[-1] * 4.5)
    axes.set_xlabel("tokens", fontsize=8, color=FAINT)
    axes.grid(color="#e5e5ea", linewidth=0.6)
    axes.tick_params(labelsize=7.5, length=0, colors=FAINT)
    axes.spines[:].set_visible(False)
    return ends


def name_lines(axes: Any, ends: list[End]) -> None:
    """Names at the right of where lines end, moved up where they would touch; left of a line that ends before the others."""
    last, below = max(x for x, *_ in ends), float("-inf")
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        style = {"textcoords": "offset points", "fontsize": 8.5, "color": colour}
        if x < last:
            axes.annotate(name, (x, y), (-7, 3), ha="right", **style)
            continue
        at = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        below = max(at, below + 11)
        axes.annotate(name, (x, y), (7, below - at), va="center", **style)


def main() -> None:
    parser = table_parser(__doc__)
    parser.add_argument("--sweeps", default="tokens,layers,heads,batch", help="which tables")
    options = parser.parse_args()
    found = read_results("scaling", options.results)
    for name, results in found.items():
        print(f"\n{tables(results, options.sweeps.split(','))}" if results else f"\nOn {name}: not measured.")
    measured = [results for results in found.values() if results]
    if options.plot and measured:
        plot(measured[-1], options.plot)


if __name__ == "__main__":
    main()
