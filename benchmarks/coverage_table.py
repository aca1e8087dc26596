"""What coverage.py has found of each architecture, and tables of it in markdown."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "coverage.json"
TOOLS = {
    "hookattn": "hookattn",
    "`timm.utils.AttentionExtract`, hook": "extract_hook",
    "`timm.utils.AttentionExtract`, fx": "extract_fx",
    "naive recompute": "naive",
}
WORDS = ("exact", "missing", "wrong", "empty", "raises")
# classes whose softmax weighs places, branches or images by themselves: there is no pair of a query and a key
PAIRLESS = {
    *("layers.global_context.GlobalContext", "layers.lambda_layer.LambdaLayer", "layers.split_attn.RadixSoftmax"),
    *("layers.selective_kernel.SelectiveKernelAttn", "models.csatv2.SpatialTransformerBlock", "models.efficientvim.HSMSSD"),
    *("models.efficientvim.EfficientViM", "models.efficientvim.EfficientViMDistilled"),
    *("models.coat.FactorAttnConvRelPosEnc", "models.mobilevit.LinearSelfAttention"),
}


@dataclass
class Record:
    """What was found of one architecture."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    size: Any = None
    dtype: str = "meta"
    hookattn: str = ""
    worst: float = 0.0
    verify: float | None = None
    same_output: bool | None = None
    entropy: float | None = None  # mean of the reference maps, of the largest there can be; None: no map over pairs
    classes: dict[str, dict[str, int]] = field(default_factory=dict)  # class: {verdict: calls that form a softmax}
    reasons: dict[str, str] = field(default_factory=dict)  # class: why it is refused, or what is wrong
    axes: dict[str, str] = field(default_factory=dict)  # class: whether evidence finds its first map with the same axes
    notes: list[str] = field(default_factory=list)
    extract_hook: str = ""
    extract_fx: str = ""
    naive: str = ""
    peers: dict[str, str] = field(default_factory=dict)  # what is missing, wrong or raised there
    seconds: float = 0.0


def read_records(path: Path = RESULTS) -> list[Record]:
    return [Record(**r) for r in json.loads(path.read_text())["records"]]


def tables(records: Sequence[Record]) -> str:
    """By tool, over the architectures that have maps; what of the others; and by class."""
    return "\n\n".join((table_by_tool(records), the_others(records), table_by_class(records)))


def table_by_tool(records: Sequence[Record]) -> str:
    heads = "exact | some maps missing | wrong without an error | empty without an error | raises or refuses"
    lines = [f"| {count_by_tool(records, 'hookattn').total()} architectures | {heads} |", "|---|---|---|---|---|---|"]
    for tool, attribute in TOOLS.items():
        counts = count_by_tool(records, attribute)
        lines.append(f"| {tool} | {' | '.join(str(counts[word]) for word in WORDS)} |")
    return "\n".join(lines)


def count_by_tool(records: Sequence[Record], attribute: str) -> Counter[str]:
    """How many architectures that have maps got which verdict."""
    return Counter(getattr(r, attribute) for r in records if r.entropy is not None and attribute)


def the_others(records: Sequence[Record]) -> str:
    others = Counter(r.hookattn for r in records if r.entropy is None)
    return (
        f"The {others.total()} others have no map over pairs, and hookattn gives none: {others['none']} form no softmax,\n"
        f"{others['raises']} only softmaxes over places or branches, which are refused by name ({others['wrong']} wrong)."
    )


def table_by_class(records: Sequence[Record]) -> str:
    """By class of attention; with how often evidence proves the axes of its maps, if that was looked at."""
    heads = ["class", "architectures", "calls", "exact", "refused", "wrong", "axes proven", "why"]
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    why: dict[str, str] = {}
    for record in records:
        for kind, verdicts in record.classes.items():
            kinds[kind].update(["architectures"], calls=sum(verdicts.values()), **verdicts)
            why[kind] = why.get(kind) or record.reasons.get(kind, "")
        for kind, verdict in record.axes.items():
            kinds[kind].update(looked_at=1, proven=verdict == "proven", other=verdict == "other")
    rows = [heads]
    for kind, counted in sorted(kinds.items(), key=lambda item: -item[1]["architectures"]):
        numbers = [str(counted[word]) for word in heads[1:6]]
        axes = f"{counted['proven']} of {counted['looked_at']}" if counted["looked_at"] else ""
        rows.append([f"`{kind}`", *numbers, axes, why.get(kind, "")])
    if not any(record.axes for record in records):
        rows = [[*row[:6], row[7]] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)
