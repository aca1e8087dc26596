"""Run as a script: does what is asked for in a line, with a hub that the environment names, and answers in a line of JSON."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer

from typer.testing import CliRunner  # noqa: E402

from hookattn import HookattnError  # noqa: E402
from hookattn.cli.app import app  # noqa: E402
from support.inside import open_images  # noqa: E402


def run(*args: str) -> list[Any]:
    """How a command ends, and what it prints."""
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return [result.exit_code, result.stdout, result.stderr]


def look(typed: str) -> dict[str, Any]:
    """The images of a source, or why there are none."""
    try:
        images = open_images(typed)
    except HookattnError as error:
        return {"error": str(error)}
    hashes = [hashlib.sha256(images.read(n)).hexdigest() for n in range(len(images))]
    return {"names": images.names, "labels": images.labels, "hashes": hashes, "address": images.address}


if __name__ == "__main__":
    logging.basicConfig()  # to where a handler can write for good, not to what a command prints
    for line in sys.stdin:
        what, args = json.loads(line)
        print(json.dumps({"run": run, "look": look}[what](*args)), file=answers, flush=True)
