"""The hub of Hugging Face: whether it answers, and what its refusals mean."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlparse

import huggingface_hub.constants as hub
from huggingface_hub import errors, try_to_load_from_cache

from ...errors import HookattnError

_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")  # where files lie that were fetched
_PATIENCE = 4.0  # seconds for a connection, which takes a fraction of one
LOG_IN = "type `hf auth login`, or set HF_TOKEN"
"""How the hub learns who asks."""


@contextmanager
def not_waiting_for_hub() -> Iterator[None]:
    """Take only what was fetched before where the hub does not answer: its clients would wait and try again for minutes."""
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not _answers()
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


@contextmanager
def asking_hub(address: str) -> Iterator[None]:
    """Say what the hub means where files of it are opened by their address, of which nothing is kept here."""
    if hub.HF_HUB_OFFLINE:
        raise HookattnError(f"{address!r} lies on the hub, and HF_HUB_OFFLINE is set: unset it, or type datasets:OWNER/NAME.")
    if not _answers():
        raise HookattnError(f"{address!r} lies on the hub ({hub.ENDPOINT}), which does not answer: try again with a network.")
    try:
        yield
    except HookattnError as error:
        if why := explain_refusal(error):
            raise HookattnError(f"{address!r} cannot be read: {why}.") from error
        raise


def _answers() -> bool:
    """Whether the hub takes a connection, asked first of one address of each kind; behind a proxy it need not."""
    if any(name.lower().endswith("_proxy") for name in os.environ):
        return True
    where = urlparse(hub.ENDPOINT)
    try:
        port = where.port or (80 if where.scheme == "http" else 443)
        found = socket.getaddrinfo(where.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return False
    return any(_connects(family, place) for family, place in {each[0]: each[4] for each in reversed(found)}.items())


def _connects(family: int, place: Any) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.settimeout(_PATIENCE)
            tried.connect(place)
    except OSError:
        return False
    return True


def find_fetched_commit(repository: str, file: str, revision: str | None = None) -> str | None:
    """The commit of a revision of a repository as it was fetched last; None where it was not."""
    path = try_to_load_from_cache(repository, file, revision=revision)
    found = _COMMIT.search(path.replace(os.sep, "/")) if isinstance(path, str) else None
    return found and found[1]


def explain_refusal(error: BaseException) -> str | None:
    """What the hub means by an error of its clients, and what to type next; None for an error of another kind."""
    causes = list(_causes(error))
    for kind, explain in _REFUSALS:
        if found := next((each for each in causes if isinstance(each, kind)), None):
            return f"{explain(found)} ({type(found).__name__})"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _explain_gated(_: BaseException) -> str:
    return f"it is gated: ask for access on its page of the hub, then {LOG_IN}"


def _explain_missing(_: BaseException) -> str:
    return f"the hub has no repository of this name that it shows you: check the name; if it is a private one, {LOG_IN}"


def _explain_revision(_: BaseException) -> str:
    return "its repository has no such branch, tag or commit: check what follows the @"


def _explain_entry(error: BaseException) -> str:
    url = getattr(getattr(error, "response", None), "url", "")
    file = urlparse(str(url)).path.rpartition("/")[2] or "such file"
    return f"its repository has no {file}: is it one of another library, or of another kind?"


def _explain_away(_: BaseException) -> str:
    if hub.HF_HUB_OFFLINE:
        return "it was not fetched before, and HF_HUB_OFFLINE is set: unset it to fetch it"
    return f"it was not fetched before, and the hub ({hub.ENDPOINT}) does not answer: try again with a network"


# the narrower ones first: what is gated is also not found, and what is not in the cache has no entry there
_REFUSALS: tuple[tuple[Any, Callable[[BaseException], str]], ...] = (
    (errors.GatedRepoError, _explain_gated),
    (errors.RepositoryNotFoundError, _explain_missing),
    (errors.RevisionNotFoundError, _explain_revision),
    ((ConnectionError, errors.LocalEntryNotFoundError), _explain_away),
    (errors.EntryNotFoundError, _explain_entry),
)
