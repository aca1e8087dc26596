"""Whether the maps are right, on every architecture of timm: hookattn, timm's AttentionExtract and a naive recompute.

usage: python benchmarks/coverage.py [--only "vit_*"] [--device cpu|cuda] [--jobs 1] [--resume] [--markdown]
           [--out benchmarks/results/coverage.json]

An architecture runs once as it is on the meta device, which tells the classes that form a softmax there. It is then built as
small as it goes with the same classes (smallest.py), its parameters are randomised, its batch norms calibrated, and everything
is float64. The reference is what each softmax of the model puts out when every `fused_attn` flag is off (oracle.py).

    exact    every softmax over pairs has its map, in order, and none differs by more than 1e-9 (float32: 1e-5)
    missing  some have none; of hookattn: each of these is named, with the reason
    wrong    a map that differs or should not be there; of hookattn, too: one that is left out without a word
    empty    no map and no error
    raises   an error instead of maps; of hookattn: refused, with the reason
    none     no softmax, and hookattn refuses

On a GPU the architectures that have maps are built as they were on the CPU, and hookattn alone is judged, by what the model
forms there (results/coverage-cuda.json).

The axes of the first map of each class are looked at as well, with no regard to its recipe: what multiplies the values is
found by derivatives of the module's forward (hookattn.maps.evidence), and must be the map, axis by axis.

    proven       it is
    undecided    evidence does not tell, such as between channels, or where values are mixed over places after the map
    other        it is something else: a sum of several maps of one head
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import math
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from command import plain_parser, say
from coverage_table import PAIRLESS, RESULTS, TOOLS, Record, read_records, tables
from machine import describe_machine, installed_versions
from oracle import Call, kind_of, largest_difference, softmaxes_by_call
from peers import recomputed
from smallest import build, in_full, smallest
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hookattn import AttentionMap, AttentionRecorder
from hookattn.errors import HookattnError, UnreadableError
from hookattn.maps.replay import replayed_by_evidence

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
PEERS: dict[str, Callable[[nn.Module, Tensor], dict[str, Tensor]]] = {
    "extract_hook": lambda model, x: AttentionExtract(copy.deepcopy(model), method="hook")(x),  # it leaves its hooks behind
    "extract_fx": lambda model, x: AttentionExtract(copy.deepcopy(model))(x),
    "naive": recomputed,
}
# an architecture for each class that forms a softmax
REPRESENTATIVES = """
    beit_base_patch16_224 caformer_s18 cait_xxs24_224 coat_tiny convit_tiny cpubone_nano crossvit_tiny_240 csatv2
    davit_base_fl davit_tiny eca_botnext26ts_256 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1
    efficientvit_m0 efficientvim_m1_dist eva02_tiny_patch14_224 fastvit_mci0 gcresnext26ts gcvit_xxtiny gemma4_vit_167m
    halonet26t hiera_tiny_224 iformer_t lambda_resnet26rpt_256 levit_128s lowformer_b0 mobilenetv4_hybrid_medium_075
    mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small pvt_v2_b0 resnest14d resnet50_clip hieradet_small
    samvit_base_patch16_224 shvit_s1 skresnet18 swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
    test_coatnet test_maxvit test_vit test_vit3 test_vit_relpos tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_svt_small
    visformer_tiny vit_dpwee_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256 vit_pe_spatial_tiny_patch16_512
    vit_pwee_patch16_reg1_gap_256 volo_d1_224 xcit_nano_12_p16_224
""".split()  # noqa: SIM905


def read(model: nn.Module, x: Tensor, record: Record) -> tuple[dict[str, Any], dict[str, str]]:
    """hookattn's maps, or its reasons in place of one; and its reasons for other modules by name, or "*" for all of them."""
    maps: dict[str, Any] = {}
    try:
        with AttentionRecorder(model) as rec, torch.no_grad():
            output = pytree.tree_leaves(model(x))
        recorded = rec.maps
    except HookattnError as error:
        return {}, {"*": f"{type(error).__name__}: {error}"}
    for name, m in recorded.items():
        try:
            maps[name] = m[...]
            record.verify = max(record.verify or 0.0, 0.0 if x.is_meta else m.verify())
        except UnreadableError as error:
            maps.setdefault(name, str(error))
        except Exception as error:  # nothing else is expected here
            record.notes.append(f"{name}: {error!r}")
    record.axes = {} if x.is_meta else prove_axes(recorded, maps)
    with torch.no_grad():
        again = pytree.tree_leaves(model(x))
    record.same_output = x.is_meta or all(torch.equal(a, b) for a, b in zip(output, again))
    record.notes += [] if record.same_output else ["the output is another one while the recorder is open"]
    return maps, rec.skipped


def prove_axes(recorded: Mapping[str, AttentionMap], maps: dict[str, Any]) -> dict[str, str]:
    """By class, whether evidence finds the first map of it with the same axes."""
    found: dict[str, str] = {}
    for name, m in recorded.items():
        kind = kind_of(m.call.layer.module)
        if kind not in found and isinstance(maps.get(name), Tensor):
            try:
                with m.call.resumed():
                    evident = replayed_by_evidence(m.call).narrow().values()
                same = evident.shape == m.shape and largest_difference(evident, maps[name]) <= TOLERANCE[evident.dtype]
                found[kind] = "proven" if same else "other"
            except UnreadableError:
                found[kind] = "undecided"
    return found


def reason(call: Call, skipped: dict[str, str]) -> str:
    """Why there is no map of a call, in hookattn's words; empty where it says nothing."""
    if "*" in skipped:
        own = re.search(rf"{type(call.module).__name__}: [^;]+", skipped["*"])
        return own[0] if own else skipped["*"]
    above = call.base or type(call.module).__name__
    while above not in skipped and "." in above:
        above = above.rpartition(".")[0]
    return skipped.get(above, "")


def judge(record: Record, calls: Sequence[Call], maps: dict[str, Any], skipped: dict[str, str]) -> None:
    """hookattn's verdict, for each class and over all."""
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    for call in calls:
        given = maps[call.name] if call.name in maps else reason(call, skipped)
        if isinstance(given, Tensor):
            off = math.inf if call.kind in PAIRLESS else largest_difference(given, call.canonical())
            record.worst = max(record.worst, off)
            verdict, why = ("exact", "") if off <= TOLERANCE[given.dtype] else ("wrong", f"{call.name}: off by {off:.2g}")
        else:
            verdict, why = ("refused", given) if given else ("wrong", f"{call.name}: no map, and no word of it")
        verdicts[call.kind][verdict] += 1
        record.reasons |= {call.kind: why} if why else {}
    names, formed = [n for n, m in maps.items() if isinstance(m, Tensor)], [c.name for c in calls]
    if names != [n for n in formed if n in names]:
        verdicts["-"]["wrong"], record.reasons["-"] = 1, f"maps of no softmax, or in another order: {names}"
    record.classes = {kind: dict(found) for kind, found in verdicts.items()}
    found = {v for kind, counts in verdicts.items() for v in counts if v == "wrong" or kind not in PAIRLESS}
    if "wrong" in found:
        record.hookattn = "wrong"
    elif calls:
        record.hookattn = "raises" if "exact" not in found else "missing" if "refused" in found else "exact"
    else:
        record.hookattn, record.reasons["-"] = "none", skipped.get("*") or next(iter(maps.values()), "")


def compared(calls: Sequence[Call], ask: Callable[[], dict[str, Tensor]]) -> tuple[str, str]:
    """A verdict on maps by name of a module, or of something in it: any form that the model itself has them in is right."""
    try:
        with torch.no_grad():
            given = ask()
    except Exception as error:  # whatever a user would see
        return "raises", repr(error)[:200]
    seen = set()
    for name, tensor in given.items():
        forms = []
        for c in [c for c in calls if c.base and f"{name}.".startswith(f"{c.base}.")]:
            whole = [*c.applied, *([] if c.kind in PAIRLESS else [c.canonical()])]
            forms += [((c.name, i), form) for i, s in enumerate(c.softmaxes) for form in (s, *whole)]
        right = {which for which, form in forms if largest_difference(tensor, form) <= TOLERANCE[form.dtype]}
        if not right:
            return "wrong", name
        seen |= right
    wanted = {(c.name, i) for c in calls if c.kind not in PAIRLESS for i in range(len(c.softmaxes))}
    return ("exact" if wanted <= seen else "missing" if given else "empty"), ", ".join(sorted(n for n, _ in wanted - seen)[:3])


def examine(name: str, like: Record | None = None, *, others: bool = True, device: str = "cpu") -> Record:
    """Build one architecture, like before or as small as it goes, read its maps in all four ways (or one) and judge them."""
    record, began = Record(name), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x, calls = built(record, like, device)
        record.dtype = "meta" if x.is_meta else str(x.dtype).removeprefix("torch.")
        judge(record, calls, *read(model, x, record))
        maps = [c.canonical() for c in calls if c.kind not in PAIRLESS]
        if maps:
            rows = [float(torch.special.entr(m.double()).sum(-1).mean()) / math.log(max(2, m.shape[-1])) for m in maps]
            record.entropy = round(sum(rows) / len(rows), 4)
            for peer, ask in PEERS.items() if others else ():
                verdict, record.peers[peer] = compared(calls, partial(ask, model, x))
                setattr(record, peer, verdict)
    record.seconds = round(time.perf_counter() - began, 2)
    return record


def built(record: Record, like: Record | None, device: str) -> tuple[Any, Tensor, list[Call]]:
    """The model of a record, two images for it, and its calls that form softmaxes."""
    if like is not None:
        record.kwargs, record.size = like.kwargs, like.size
        model, x = build(record.name, like.kwargs, like.size)
        model, x = model.to(device), x.to(device)
        return model, x, softmaxes_by_call(model, x)
    model, arguments = in_full(record.name)
    x = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
    calls = softmaxes_by_call(model, x)
    if calls:
        kinds = {c.kind for c in calls}
        model, x, calls, record.kwargs, record.size = smallest(record.name, model, arguments, kinds, PAIRLESS)
    return model, x, calls


def report(records: Sequence[Record], device: str) -> str:
    """The file of results: one line for each architecture."""
    tools = TOOLS if device == "cpu" else {"hookattn": "hookattn"}
    head = {
        "versions": installed_versions(),
        "machine": describe_machine(device),
        "seconds": round(sum(r.seconds for r in records)),
        "totals": {tool: Counter(getattr(r, a) for r in records if r.entropy is not None) for tool, a in tools.items()},
    }
    lines = [json.dumps({k: v for k, v in asdict(r).items() if v not in ("", None, {}, [])}) for r in records]
    return json.dumps(head, indent=1)[:-2] + ',\n "records": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def examine_unattended(name: str, like: Record | None, device: str) -> Record:
    """Examine one of many: what goes wrong is noted, for the others to go on."""
    torch.set_num_threads(1)
    try:
        return examine(name, like, others=device == "cpu", device=device)
    except Exception as error:  # of this benchmark's own; to be none
        return Record(name, hookattn="unbuilt", notes=[repr(error)])


def run(options: argparse.Namespace) -> None:
    """Examine all that is asked for; what is found is written down after each, for an interrupted run to go on."""
    log = options.out.with_suffix(".jsonl")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        log.unlink(missing_ok=True)
    done = {r["name"]: Record(**r) for r in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    before = {} if options.device == "cpu" else {r.name: r for r in read_records() if r.entropy is not None}
    names = fnmatch.filter(before or timm.list_models(), options.only)
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        asked = [pool.submit(examine_unattended, n, before.get(n), options.device) for n in names if n not in done]
        for i, answer in enumerate(as_completed(asked)):
            record = done[answer.result().name] = answer.result()
            with log.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
            say(f"{i + 1}/{len(asked)} {record.name}: {record.hookattn} {record.notes}")
    options.out.write_text(report([done[name] for name in names], options.device))


def main() -> None:
    parser = plain_parser(__doc__)
    parser.add_argument("--only", default="*", help="architectures by name, as a glob")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes; each has its own model")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run has found")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the results that are there")
    parser.add_argument("--out", type=Path, help="file of results")
    options = parser.parse_args()
    options.out = options.out or (RESULTS if options.device == "cpu" else RESULTS.with_stem("coverage-cuda"))
    if not options.markdown:
        run(options)
    print(tables(read_records(options.out)))


if __name__ == "__main__":
    main()
