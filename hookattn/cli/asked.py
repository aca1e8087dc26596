"""What several commands are asked: the model, what of it is recorded, and how it is shown photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple, Union

import typer

DEFAULT_MODEL = "vit_small_patch14_reg4_dinov2.lvd142m"
RETRY = "--retry"  # of extract, which show tells of, too


class Asked(NamedTuple):
    """The model, what of it is recorded, and how it is shown photos; all as it was typed."""

    model: str
    checkpoint: Path | None
    layers: str | None
    img_size: str | None
    crop: str | None
    device: str
    dtype: str


NAMES = "A model of timm, hf-hub:ID or local-dir:PATH for timm, transformers:ID, open_clip:NAME/WEIGHTS."
Photos = Annotated[list[Path], typer.Argument(help="Photos, and folders of them.")]
Model = Annotated[str, typer.Option("--model", "-m", help=NAMES)]
Checkpoint = Annotated[
    Union[Path, None], typer.Option("--checkpoint", "-c", help="Weights from a file: .safetensors, .pth. No code in it is run.")
]
Layers = Annotated[Union[str, None], typer.Option(help="Names, globs or positions, comma separated: blocks.1*.attn,-1")]
ImgSize = Annotated[
    Union[str, None], typer.Option(metavar="H,W", help="This many pixels instead of the model's own; or one number.")
]
Crop = Annotated[
    Union[str, None],
    typer.Option(metavar="none|center", help="Show the whole photo or its middle; whole if the model takes any size."),
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")]
DType = Annotated[str, typer.Option("--dtype", help="float32, float16, bfloat16 or float64.")]
Json = Annotated[bool, typer.Option("--json", help="A summary in JSON on stdout, and nothing else there.")]
