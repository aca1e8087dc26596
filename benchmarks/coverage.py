"""Whether the maps are right, on every architecture of timm: hookattn, timm's AttentionExtract and a naive recompute.

usage: python benchmarks/coverage.py [--only "vit_*"] [--resume] [--markdown] [--out benchmarks/results/coverage.json]

An architecture runs once as it is on the meta device, which tells the classes that form a softmax there. It is then built as
small as it goes with the same classes, its parameters are randomised, its batch norms calibrated, and everything is float64.
The reference is what each softmax of the model puts out when every `fused_attn` flag is off; it knows nothing of hookattn.

    exact    every softmax over pairs has its map, in order, and none differs by more than 1e-9 (float32: 1e-5)
    missing  some have none; of hookattn: each of these is named, with the reason
    wrong    a map that differs or should not be there; of hookattn, too: one that is left out without a word
    empty    no map and no error
    raises   an error instead of maps; of hookattn: refused, with the reason
    none     no softmax, and hookattn refuses
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import inspect
import itertools
import json
import math
import re
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from einops import rearrange
from timm.utils.attention_extract import AttentionExtract
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hookattn import AttentionRecorder
from hookattn.errors import HookattnError, UnreadableError

Built = tuple[Any, Tensor, list["Call"]]
RESULTS = Path(__file__).parent / "results" / "coverage.json"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
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
# how a softmax that is not (images * windows, heads, queries, keys) already becomes that
FOLDS = {
    "(b h) q k -> b h q k": ("layers.bottleneck_attn.BottleneckAttn", "models.vision_transformer_sam.Attention"),
    "(b h) w q k -> (b w) h q k": ("layers.halo_attn.HaloAttn",),
    "b h w q k -> (b w) h q k": ("models.hiera.MaskUnitAttention", "models.nest.Attention", "models.volo.OutlookAttention"),
    "b w h q k -> (b w) h q k": ("models.twins.LocallyGroupedAttn",),
    "b q k -> b 1 q k": ("models.efficientvit_msra.CascadedGroupAttention", "models.iformer.SHMA", "models.shvit.SHSA"),
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
    notes: list[str] = field(default_factory=list)
    extract_hook: str = ""
    extract_fx: str = ""
    naive: str = ""
    peers: dict[str, str] = field(default_factory=dict)  # what is missing, wrong or raised there
    seconds: float = 0.0


@dataclass
class Call:
    """One call of one module, and what its softmaxes put out."""

    base: str
    name: str
    module: Any
    softmaxes: list[Tensor] = field(default_factory=list)
    applied: list[Tensor] = field(default_factory=list)  # what came out of its `attn_drop`: the map after heads were mixed

    @property
    def kind(self) -> str:
        return f"{type(self.module).__module__}.{type(self.module).__qualname__}".removeprefix("timm.")

    def canonical(self) -> Tensor:
        """(images * windows, heads, queries, keys); the heads of several softmaxes in turn."""
        fold, maps = next((f for f, kinds in FOLDS.items() if self.kind in kinds), ""), self.softmaxes
        if maps[0].dim() == len(fold.partition(" ->")[0].replace("b h)", "b)").split()):
            maps = [rearrange(m, fold, **({"h": self.module.num_heads} if "(b h)" in fold else {})) for m in maps]
        if maps[0].dim() != 4:
            raise RuntimeError(f"no fold is known for the softmax {tuple(maps[0].shape)} of {self.kind}")
        return torch.stack(maps, dim=2).flatten(1, 2)


def softmaxes(model: nn.Module, x: Tensor) -> list[Call]:
    """Calls that form softmaxes in a forward without fused attention, in the order they start."""
    names = {module: name for name, module in model.named_modules()}
    times: Counter[str] = Counter()
    calls: list[Call] = []
    running: list[Call] = []

    def start(module: nn.Module, _: Any) -> None:
        if module in names and not isinstance(module, nn.Softmax):
            base = names[module]
            running.append(Call(base, f"{base}#{times[base]}" if times[base] else base, module))
            calls.append(running[-1])
            times[base] += 1

    def stop(module: nn.Module, _: Any, output: Any) -> None:
        if running and running[-1].module is module:
            running.pop()
            if names[module].endswith("attn_drop"):
                running[-1].applied.append(output.detach().clone())

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
            if name == "scaled_dot_product_attention":
                raise RuntimeError(f"fused attention runs in {running[-1].name} although the flags are off")
            if name == "softmax":
                running[-1].softmaxes.append(out.detach().clone())
            return out

    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            if getattr(module, "fused_attn", False):
                stack.enter_context(mock.patch.object(module, "fused_attn", False))
        stack.enter_context(register_module_forward_pre_hook(start))
        stack.enter_context(register_module_forward_hook(stop, always_call=True))
        stack.enter_context(Watch())
        model(x)
    return [call for call in calls if call.softmaxes]


def in_full(name: str) -> tuple[Any, dict[str, Any]]:
    """An architecture as it is, without memory, and the arguments that its class is made with."""
    arguments: dict[str, Any] = {}
    true = timm.models.build_model_with_cfg

    def build(cls: type, *args: Any, **kwargs: Any) -> Any:
        for c in reversed(cls.__mro__[:-2]):
            arguments.update({p.name: p.default for p in inspect.signature(c).parameters.values()})
        cfg = kwargs.get("model_cfg", kwargs.get("cfg"))
        if is_dataclass(cfg) and "kwargs" in arguments:  # a class that takes arguments over those of its cfg
            arguments.update(vars(cfg))
        arguments.update(kwargs)
        return true(cls, *args, **kwargs)

    with ExitStack() as stack, torch.device("meta"):
        for module in [m for key, m in sys.modules.items() if key.startswith("timm.models.")]:
            if hasattr(module, "build_model_with_cfg"):
                stack.enter_context(mock.patch.object(module, "build_model_with_cfg", build))
        return timm.create_model(name).eval(), {k: v for k, v in arguments.items() if v is not inspect.Parameter.empty}


def ladder(arguments: dict[str, Any], full: tuple[int, int]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Arguments and an input size to try, from the smallest model to the one as it is."""
    names = [k for k in ("depth", "depths", "layers", "stages", "serial_depths") if arguments.get(k)]
    depth = {k: pytree.tree_map(lambda d: min(d, 2), arguments[k]) for k in names}
    if isinstance(arguments.get("depth"), int):  # what is told block by block
        long = {k: v for k, v in arguments.items() if isinstance(v, (tuple, list)) and len(v) == arguments["depth"]}
        depth |= {k: type(v)((v[0], v[len(v) // 2])) for k, v in long.items()}
    wide, heads = {}, arguments.get("num_heads")
    for key in [k for k in ("embed_dim", "embed_dims", "dims") if arguments.get(k)]:
        width = arguments[key]
        if isinstance(width, int):
            wide = {key: 16 * pytree.tree_leaves(heads)[0]} if heads else {}
        elif all(isinstance(w, int) for w in width):
            heads = heads if isinstance(heads, (tuple, list)) and len(heads) == len(width) else None
            wide = {key: type(width)(16 * h for h in heads) if heads else type(width)(32 * round(w / width[0]) for w in width)}
    special: dict[str, Any] = {"window_size": 4, "local_up_to_layer": 1, "intermediate_size": 96}
    special |= {"window_size": 3, "global_attn_indexes": (1,)} if arguments.get("global_attn_indexes") else {}
    special = {k: v for k, v in special.items() if arguments.get(k) or (k in arguments and "window_ratio" not in arguments)}
    patch = arguments.get("patch_size")
    small = 4 * patch if isinstance(patch, int) and patch > 8 else 64
    for kwargs in ({**depth, **wide, **special}, {**depth, **wide}, {**depth, **special}, depth, {}):
        for size in sorted({small, max(small, 96), full[0] // 2, min(full[0], 256)}):
            two = isinstance(arguments.get("img_size"), (tuple, list))
            yield kwargs | ({"img_size": (size, size) if two else size} if "img_size" in arguments else {}), size
    yield {}, full


def build(name: str, kwargs: dict[str, Any], size: Any, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A model in eval mode with noise on all that a fresh one has at zero or one, and two images for it.

    Batch norms, and they alone, take the statistics of one forward on them: maps are neither flat nor one-hot.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        constants = {n: b for n, b in module.named_buffers(recurse=False) if n.endswith("bias") and b.is_floating_point()}
        for key, tensor in {**dict(module.named_parameters(recurse=False)), **constants}.items():
            matrix = key.endswith("weight") and tensor.dim() > 1
            spread = tensor[0].numel() ** -0.5 if matrix else 0.5 if "bias" in key else 0.3
            tensor.data.add_(torch.randn_like(tensor), alpha=spread)
    x = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size), dtype=dtype)
    norms = [m for m in model.to(dtype).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    with torch.no_grad():
        model(x)
    for norm in norms:
        norm.training = False
    return model, x


def smallest(record: Record, model: Any, arguments: dict[str, Any], kinds: set[str]) -> Built:
    """The first model of the ladder that runs, with softmaxes in the very classes of the full one and more than four keys."""
    failures: list[str] = []
    huge, full = sum(p.numel() for p in model.parameters()) > 1e9, model.pretrained_cfg["input_size"][1:]
    for dtype, (kwargs, size) in itertools.product(TOLERANCE, ladder(arguments, full)):
        if huge and not kwargs.keys() - {"img_size"}:
            continue
        try:
            built, x = build(record.name, kwargs, size, dtype)
            calls = softmaxes(built, x)
        except Exception as error:  # whatever timm raises on arguments that do not fit
            failures.append(f"{kwargs} at {size}: {error!r}")
            continue
        keys: Counter[str] = Counter()
        for call in calls:
            keys[call.kind] = max(keys[call.kind], *(s.shape[-1] for s in call.softmaxes))
        if keys.keys() == kinds and (size == full or all(keys[kind] > 4 for kind in kinds - PAIRLESS)):
            record.kwargs, record.size = kwargs, size
            return built, x, calls
        failures.append(f"{kwargs} at {size}: other classes, or few keys")
    raise RuntimeError("; ".join(failures))


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
    with torch.no_grad():
        again = pytree.tree_leaves(model(x))
    record.same_output = x.is_meta or all(torch.equal(a, b) for a, b in zip(output, again))
    record.notes += [] if record.same_output else ["the output is another one while the recorder is open"]
    return maps, rec.skipped


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
            off = math.inf if call.kind in PAIRLESS else distance(given, call.canonical())
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


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or something is not finite."""
    return float((a.double() - b.double()).abs().nan_to_num(math.inf).max()) if a.shape == b.shape else math.inf


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
        right = {which for which, form in forms if distance(tensor, form) <= TOLERANCE[form.dtype]}
        if not right:
            return "wrong", name
        seen |= right
    wanted = {(c.name, i) for c in calls if c.kind not in PAIRLESS for i in range(len(c.softmaxes))}
    return ("exact" if wanted <= seen else "missing" if given else "empty"), ", ".join(sorted(n for n, _ in wanted - seen)[:3])


def recomputed(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What many projects copy: q and k from `qkv`, their norms, the scale and a softmax, in a hook."""
    maps: dict[str, Tensor] = {}

    def hook(name: str, m: Any, x: Tensor) -> None:
        batch, tokens, _ = x.shape
        q, k, _ = m.qkv(x).reshape(batch, tokens, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = getattr(m, "q_norm", nn.Identity())(q), getattr(m, "k_norm", nn.Identity())(k)
        maps[name] = (q @ k.transpose(-2, -1) * m.scale).softmax(-1)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if hasattr(module, "qkv") and hasattr(module, "num_heads"):
                stack.enter_context(module.register_forward_pre_hook(lambda m, args, name=name: hook(name, m, args[0])))
        model(x)
    return maps


def examine(name: str, kwargs: dict[str, Any] | None = None, size: Any = 224, others: bool = True) -> Record:
    """Build one architecture, as told or as small as it goes, read its maps in all four ways (or one) and judge them."""
    record, began = Record(name), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kwargs is None:
            model, arguments = in_full(name)
            x = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
            calls = softmaxes(model, x)
            if calls:
                model, x, calls = smallest(record, model, arguments, {c.kind for c in calls})
        else:
            record.kwargs, record.size = kwargs, size
            model, x = build(name, kwargs, size)
            calls = softmaxes(model, x)
        record.dtype = "meta" if x.is_meta else str(x.dtype).removeprefix("torch.")
        judge(record, calls, *read(model, x, record))
        maps = [c.canonical() for c in calls if c.kind not in PAIRLESS]
        if maps:
            rows = [float(torch.special.entr(m.double()).sum(-1).mean()) / math.log(max(2, m.shape[-1])) for m in maps]
            record.entropy = round(sum(rows) / len(rows), 4)
            peers: dict[str, Callable[[], dict[str, Tensor]]] = {
                "extract_hook": lambda: AttentionExtract(copy.deepcopy(model), method="hook")(x),  # it leaves its hooks behind
                "extract_fx": lambda: AttentionExtract(copy.deepcopy(model))(x),
                "naive": lambda: recomputed(model, x),
            }
            for peer, ask in peers.items() if others else ():
                verdict, record.peers[peer] = compared(calls, ask)
                setattr(record, peer, verdict)
    record.seconds = round(time.perf_counter() - began, 2)
    return record


def tables(records: Sequence[Record]) -> str:
    """Two tables in markdown: by tool over the architectures that have maps, and by class."""
    paired = [r for r in records if r.entropy is not None]
    heads = "exact | some maps missing | wrong without an error | empty without an error | raises or refuses"
    lines = [f"| {len(paired)} architectures | {heads} |", "|---|---|---|---|---|---|"]
    for tool, attribute in TOOLS.items():
        counts = Counter(getattr(r, attribute) for r in paired)
        lines.append(f"| {tool} | {' | '.join(str(counts[word]) for word in WORDS)} |")
    others = Counter(r.hookattn for r in records if r.entropy is None)
    lines += [
        f"\nThe {others.total()} others have no map over pairs, and hookattn gives none: {others['none']} form no softmax,",
        f"{others['raises']} only softmaxes over places or branches, which are refused by name ({others['wrong']} wrong).\n",
    ]
    lines += ["| class | architectures | calls | exact | refused | wrong | why |", "|---|---|---|---|---|---|---|"]
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    why: dict[str, str] = {}
    for record in records:
        for kind, verdicts in record.classes.items():
            kinds[kind].update(["architectures"], calls=sum(verdicts.values()), **verdicts)
            why[kind] = why.get(kind) or record.reasons.get(kind, "")
    for kind, counted in sorted(kinds.items(), key=lambda item: -item[1]["architectures"]):
        numbers = [str(counted[word]) for word in ("architectures", "calls", "exact", "refused", "wrong")]
        lines.append(f"| `{kind}` | {' | '.join(numbers)} | {why[kind]} |")
    return "\n".join(lines)


def report(records: Sequence[Record]) -> str:
    """The file of results: one line for each architecture."""
    cpus = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    head = {
        "versions": {package: version(package) for package in ("hookattn", "timm", "torch")},
        "machine": f"{cpus[0]}, one thread",
        "seconds": round(sum(r.seconds for r in records)),
        "totals": {tool: Counter(getattr(r, a) for r in records if r.entropy is not None) for tool, a in TOOLS.items()},
    }
    lines = [json.dumps({k: v for k, v in asdict(r).items() if v not in ("", None, {}, [])}) for r in records]
    return json.dumps(head, indent=1)[:-2] + ',\n "records": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="architectures by name, as a glob")
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run has found")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the results that are there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    log = options.out.with_suffix(".jsonl")
    if not options.markdown:
        torch.set_num_threads(1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            log.unlink(missing_ok=True)
        done = {r["name"]: Record(**r) for r in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
        names = fnmatch.filter(timm.list_models(), options.only)
        for i, name in enumerate(names):
            if name not in done:
                try:
                    done[name] = examine(name)
                except Exception as error:  # of this benchmark's own; to be none
                    done[name] = Record(name, hookattn="unbuilt", notes=[repr(error)])
                with log.open("a") as file:
                    file.write(json.dumps(asdict(done[name])) + "\n")
                print(f"{i + 1}/{len(names)} {name}: {done[name].hookattn} {done[name].notes}", file=sys.stderr, flush=True)
        options.out.write_text(report([done[name] for name in names]))
    print(tables([Record(**r) for r in json.loads(options.out.read_text())["records"]]))


if __name__ == "__main__":
    main()
