"""Entry point: `python -m hookattn` and the `hookattn` command."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line, or say which packages it needs."""
    # imported here, since the package itself needs neither typer nor rich, and this message has to reach who lacks them
    from .errors import MissingExtraError

    try:
        from .cli.app import app
    except MissingExtraError as error:
        sys.exit(f"hookattn: {error}")
    try:
        app()
    except SystemExit as ended:
        if ended.code in (130, 143):
            # somebody stopped it, and may do so again: whatever is put away now would complain of that
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise


if __name__ == "__main__":
    main()
