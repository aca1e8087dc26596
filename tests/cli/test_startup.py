"""What is answered before torch is there: help, the version, a shell's completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import hookattn

# each call in a process of its own, forked from one that has imported nothing
SCRIPT = """
import io, json, os, sys
calls = json.loads(sys.argv[1])
for args, env in calls:
    reading, writing = os.pipe()
    if not os.fork():
        os.dup2(writing, 1)
        os.environ.update(env)
        sys.argv = ["hookattn", *args]
        from hookattn.__main__ import main
        try:
            main()
        except SystemExit as end:
            print(json.dumps([end.code, [name for name in ("torch", "timm", "matplotlib", "numpy") if name in sys.modules]]))
            sys.stdout.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read().rstrip("\\n")
    os.wait()
    print(json.dumps(said))
"""
COMPLETE = {"_HOOKATTN_COMPLETE": "complete_bash", "_TYPER_COMPLETE_TESTING": "1"}
COMMANDS = ("demo", "record", "explore", "analyze", "extract", "show", "inspect")
CALLS: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "help": (
        ["--help"],
        {},
        [*COMMANDS, "--version", "--install-completion"],
    ),
    "version": (["--version"], {}, [f"hookattn {hookattn.__version__}"]),
    **{f"help of {name}": ([name, "--help"], {}, [f"Example: hookattn {name} ", "--help"]) for name in COMMANDS},
    "commands": ([], {**COMPLETE, "COMP_WORDS": "hookattn in", "COMP_CWORD": "1"}, ["inspect"]),
    "options": ([], {**COMPLETE, "COMP_WORDS": "hookattn record --che", "COMP_CWORD": "2"}, ["--checkpoint"]),
}


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    calls = json.dumps([(args, env) for args, env, _ in CALLS.values()])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", SCRIPT, calls], capture_output=True, text=True, timeout=300, env=env)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(CALLS, map(json.loads, ran.stdout.splitlines()), strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("call", CALLS)
def test_it_is_answered_without_torch(call: str, answers: dict[str, str]) -> None:
    *said, ended = answers[call].split("\n")
    assert json.loads(ended) == [0, []]
    assert all(each in "\n".join(said) for each in CALLS[call][2]), said
