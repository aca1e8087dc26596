"""What shows in an interpreter that has imported nothing yet; one is started for all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

# optional packages are looked for first and made missing last; a model is compiled for the first time in between
SCRIPT = """
import contextlib, importlib, io, json, sys
said = {}

import hookattn
optional = ("matplotlib", "typer", "rich", "zarr", "timm", "PIL", "pytest", "torch._dynamo")
said["imported"] = [name for name in optional if name in sys.modules]

import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attn(y, y, y, need_weights=False)[0]

torch.set_grad_enabled(False)
torch.set_num_threads(1)
model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(2, 5, 16)
expected, y = [], x
for block in model:
    n = block.norm(y)
    out, weights = block.attn(n, n, n, average_attn_weights=False)
    expected.append(weights)
    y = y + out
graphs = []
with hookattn.AttentionRecorder(model) as rec:
    torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)(x)
said["graphs"], said["maps"] = len(graphs), list(rec.maps)
said["exact"] = [bool((m[...] - e).abs().max() < 1e-6) for m, e in zip(rec.maps.values(), expected)]

import torch._inductor.compile_fx as inductor
from torch._dynamo.backends.debugging import aot_eager
inductor.compile_fx = lambda graph, inputs, **_: aot_eager(graph, inputs)
compiled, said["compiled"] = torch.compile(model), []
for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
    with mode(), hookattn.AttentionRecorder(compiled) as rec:
        compiled(x)
    said["compiled"].append([bool((m[...] - e).abs().max() < 1e-6) for m, e in zip(rec.maps.values(), expected)])

for missing, module in (("matplotlib", "hookattn.figures.plot"), ("typer", "hookattn.cli.app")):
    sys.modules[missing] = None
    try:
        importlib.import_module(module)
    except ImportError as error:
        said[module] = f"{type(error).__name__}: {error}"
from hookattn.__main__ import main
with contextlib.redirect_stderr(io.StringIO()) as stderr:
    try:
        main()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):  # which Python writes to stderr, and exits with 1
            stderr.write(code)
            code = 1
        said["main"] = [code, stderr.getvalue().strip()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_importing_hookattn_imports_no_optional_package(said: dict[str, Any]) -> None:
    assert said["imported"] == []


def test_a_model_compiled_for_the_first_time_in_the_process_inside_the_block_is_recorded(said: dict[str, Any]) -> None:
    assert (said["graphs"], said["maps"], said["exact"]) == (0, ["0.attn", "1.attn"], [True, True])


def test_a_compiled_model_is_recorded_in_inference_mode_first_and_outside_of_it_then(said: dict[str, Any]) -> None:
    assert said["compiled"] == [[True, True]] * 3


@pytest.mark.parametrize(("module", "extra"), [("hookattn.figures.plot", "plot"), ("hookattn.cli.app", "cli")])
def test_a_missing_extra_is_answered_with_what_to_type(said: dict[str, Any], module: str, extra: str) -> None:
    assert said[module].startswith("MissingExtraError: ")
    assert f'pip install "hookattn[{extra}]"' in said[module]


def test_the_command_line_says_what_it_needs(said: dict[str, Any]) -> None:
    assert said["main"] == [1, 'hookattn: the command line needs typer and rich: pip install "hookattn[cli]".']
