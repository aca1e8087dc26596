"""The command line: `hookattn demo`, `hookattn record`, `hookattn explore`, `hookattn inspect`."""

from __future__ import annotations

from ..errors import MissingExtraError

try:
    import typer

    from .explore import explore
    from .inspect import inspect_command
    from .record import record
    from .run_demo import demo
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich", "PIL"):
        raise
    raise MissingExtraError('the command line needs typer and rich: pip install "hookattn[cli]".') from error

app = typer.Typer(
    help="Read the attention of Vision Transformers.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)
app.command()(demo)
app.command()(record)
app.command()(explore)
app.command(name="inspect")(inspect_command)
