"""The command line: `hookattn demo`, `record`, `explore`, `analyze`, `extract`, `show` and `inspect`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import hookattn

from ..errors import MissingExtraError

# Neither this file nor those of the commands import torch, which takes seconds: --help and a shell's completion wait for none
# of it. A command imports what it runs when it is called.
try:
    import typer
    from typer.core import TyperGroup

    from .commands import analyze, demo, explore, extract, inspect, record, show
    from .output import print_error
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich", "PIL"):
        raise
    raise MissingExtraError('the command line needs typer and rich: pip install "hookattn[cli]".') from error


class BriefGroup(TyperGroup):
    """Commands whose mistakes are answered in one line."""

    def main(self, *args: Any, **extra: Any) -> Any:
        is_alone = extra.pop("standalone_mode", True)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # names of files may hold letters that the terminal has not
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if not hasattr(error, "format_message"):  # which mistakes have in every version of click and typer
                raise
            status = _answer(error)
        if is_alone:
            sys.exit(status if isinstance(status, int) else 0)
        return status


def _answer(error: Any) -> int:
    """Print a mistake, and return the exit status; who typed nothing gets help."""
    ctx = getattr(error, "ctx", None)
    if type(error).__name__.startswith("NoArgs"):
        typer.echo(error.format_message(), err=True)
    else:
        print_error(f"{error.format_message().rstrip('.')}. See {ctx.command_path if ctx else 'hookattn'} --help.")
    return int(error.exit_code)


app = typer.Typer(cls=BriefGroup, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hookattn {hookattn.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    """Read the attention of Vision Transformers."""


app.command(epilog="Example: hookattn demo --seed 3 -o scene.png")(demo)
app.command(epilog="Example: hookattn record dog.jpg --query 0.4,0.6 --layers blocks.1*.attn -o dog.png")(record)
app.command(epilog="Example: hookattn explore dog.jpg cat.jpg --model vit_base_patch16_224 -o pets.html")(explore)
app.command(epilog="Example: hookattn analyze photos/ --model vit_base_patch16_224 -o heads.csv")(analyze)
app.command(epilog="Example: hookattn extract photos/ --model vit_base_patch16_224 -o run.zarr")(extract)
app.command(epilog="Example: hookattn show run.zarr --image 17 -o dog.png")(show)
app.command(epilog="Example: hookattn inspect vit_base_patch16_224 --batch 64")(inspect)
