"""Write the tables of the READMEs anew from the files of results, each between two comments that name it.

usage: python benchmarks/readme_tables.py [README.md benchmarks/README.md]
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extract
import hook
import overhead
from command import RESULTS, plain_parser, say
from coverage_table import WORDS, count_by_tool, read_records, table_by_class, table_by_tool, the_others
from machine import in_words

ROOT = Path(__file__).parents[1]
SHOWN = {  # cases of throughput.py, and what they are called in the table of all models
    "fused_again": "the model alone, once more (noise)",
    "nothing_read": "recorder, nothing read",
    "class_rows": "row of the class token (Swin: first of each window), every layer",
    "rows_together": "the same, read together: `rec.rows`",
    "rows_in_forward": "the same, while the model runs",
    "one_head": "one head, every layer",
    "opened_each_time": "recorder made, opened and left around each forward, nothing read",
    "keep_maps": 'all maps, `keep="maps"`',
    "keep_maps_cpu": 'all maps, `keep="maps"`, moved to the CPU',
    "all_maps": "all maps, read after the forward",
    "statistics_without_maps": "entropy, attention received, head mean and distance, no map held",
    "statistics_in_forward": "the same, while the model runs",
    "naive": "naive recompute in a forward hook",
    "replaced_forward": "unfused: forward replacement of discussion 1232",
    "extract_hook": "unfused: `timm.utils.AttentionExtract`, hook",
    "extract_fx": "unfused: `timm.utils.AttentionExtract`, fx",
    "torchlens": "TorchLens",
}
GRAPHS = {  # these over the model as a CUDA graph
    "graph_rows": "row of the first token, every layer, captured with the model as a CUDA graph",
    "graph_maps": 'all maps, `keep="maps"`, captured so',
}
COLUMNS = {  # models of throughput.py, in float32 and eager
    "vit_small_patch16_224": "ViT-S/16, 224",
    "vit_base_patch16_224": "ViT-B/16, 224",
    "swin_tiny_patch4_window7_224": "Swin-T, 224",
    "vit_large_patch14_dinov2_518": "DINOv2-L/14, 518",
    "vit_base_patch16_1024": "ViT-B/16, 1024",
}
FRONT = {  # on the front page: a way, its attribute of a record of coverage.py, and its case of throughput.py
    "hookattn, all maps": ("hookattn", "keep_maps"),
    "hookattn, the class token's row": ("", "class_rows"),
    "`timm.utils.AttentionExtract`, hook": ("extract_hook", "extract_hook"),
    "`timm.utils.AttentionExtract`, fx": ("extract_fx", "extract_fx"),
    "q, k and softmax again in a hook": ("naive", "naive"),
    "`attn.forward` replaced": ("", "replaced_forward"),
}
FRONT_MODELS = ("vit_small_patch16_224", "vit_large_patch14_dinov2_518")


def runs() -> dict[str, dict[str, Any]]:
    """The run of each model that is shown, by name."""
    results = json.loads((RESULTS / "throughput-cpu.json").read_text())
    plain = [r for r in results["runs"] if r["dtype"] == "float32" and r["mode"] == "eager"]
    return {r["model"]: r for r in plain if r["model"] in COLUMNS}


def throughput_of_gpu() -> str:
    """Throughput on a GPU over that of the model alone, and of what is captured as a CUDA graph over that of the model so."""
    results = json.loads((RESULTS / "throughput-cuda.json").read_text())
    # a run that was not measured anew with the others is of an earlier version
    earlier = [", earlier" * r.get("earlier", False) for r in results["runs"]]
    head = [f"{COLUMNS[r['model']]}, {r['dtype']}, batch {r['batch']}{e}" for r, e in zip(results["runs"], earlier)]
    lines = [f"{in_words(results)}\n", f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for case, title in (SHOWN | GRAPHS).items():
        cells = [over_base(r, case) for r in results["runs"]]
        lines += [f"| {title} | {' | '.join(cells)} |"] * any(cells)
    for case, title in {"fused": "ms of the model alone", "graph": "ms of the model as a CUDA graph"}.items():
        lines.append(f"| {title} | {' | '.join(milliseconds(r, case) for r in results['runs'])} |")
    return "\n".join([*lines, f"| rounds | {' | '.join(str(r['rounds']) for r in results['runs'])} |"])


def milliseconds(run: dict[str, Any], case: str) -> str:
    return f"{1e3 * next(c for c in run['cases'] if c['case'] == case)['seconds']['median']:.3g}"


def over_base(run: dict[str, Any], case: str) -> str:
    """The median of a case over its base, or in a word why there is none; empty where it was not measured."""
    found = next((c for c in run["cases"] if c["case"] == case), None)
    if found is None or found["verdict"].startswith("not here"):
        return ""
    if "throughput_over_base" in found:
        return f"{found['throughput_over_base']['median']:.2f}"
    return re.match(r"[a-z]+", found["verdict"])[0]  # type: ignore[index]


def throughput() -> str:
    """Throughput over that of the model alone, all models beside each other."""
    measured = {model: run for model in COLUMNS if (run := runs().get(model))}
    head = [f"{COLUMNS[model]}, batch {run['batch']}" for model, run in measured.items()]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for case, title in SHOWN.items():
        cells = [over_base(r, case) for r in measured.values()]
        lines += [f"| {title} | {' | '.join(cells)} |"] * any(cells)
    lines += [f"| rounds | {' | '.join(str(run['rounds']) for run in measured.values())} |"]
    return "\n".join(lines)


def front() -> str:
    """By way: on how many architectures its maps are right, and how fast two models run meanwhile."""
    records, measured = read_records(), runs()
    speeds = [f"speed, {COLUMNS[model]}" for model in FRONT_MODELS]
    lines = [f"| | {' | '.join((*WORDS, *speeds))} |", "|---" * (len(WORDS) + len(speeds) + 1) + "|"]
    for way, (attribute, case) in FRONT.items():
        counts = count_by_tool(records, attribute)
        cells = [str(counts[word]) if attribute else "" for word in WORDS]
        cells += [over_base(measured[model], case) for model in FRONT_MODELS]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "front": front,
    "throughput": throughput,
    "throughput of a gpu": throughput_of_gpu,
    "hook of a gpu": lambda: hook.table(json.loads((RESULTS / "hook-cuda.json").read_text())),
    "coverage by tool": lambda: f"{table_by_tool(read_records())}\n\n{the_others(read_records())}",
    "hook": lambda: hook.table(json.loads((RESULTS / "hook-cpu.json").read_text())),
    "data set": lambda: extract.table(json.loads((RESULTS / "extract-cpu.json").read_text())),
    "overhead": lambda: overhead.table(json.loads((RESULTS / "overhead-cpu.json").read_text())),
    "coverage by class": lambda: table_by_class(read_records()),
}


def write_tables(text: str) -> str:
    """A README with all its tables written anew."""

    def written(found: re.Match[str]) -> str:
        return f"{found[1]}{TABLES[found[2]]()}\n{found[3]}"

    return re.sub(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", written, text, flags=re.DOTALL)


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("readmes", type=Path, nargs="*", default=[ROOT / "README.md", ROOT / "benchmarks" / "README.md"])
    for path in parser.parse_args().readmes:
        path.write_text(write_tables(path.read_text()))
        say(f"wrote the tables of {path}")


if __name__ == "__main__":
    main()
