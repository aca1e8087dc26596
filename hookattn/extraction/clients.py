"""Clients of stores at addresses (s3://, gs://): which it takes, and what their errors mean in words that help."""

from __future__ import annotations

import logging
import re

# it logs a traceback of each error that it raises, which Python prints where nobody has said where logs go
logging.getLogger("gcsfs").addHandler(logging.NullHandler())
_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://")
_CLIENTS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_LOGIN = {
    "s3fs": "aws configure, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a public bucket is read with "
    "FSSPEC_S3='{\"anon\": true}'",
    "gcsfs": "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS",
}
_REFUSED = re.compile(
    r"PermissionError|Credential|Forbidden|Access ?Denied|Unauthori[sz]ed|Anonymous caller|InvalidAccessKeyId|"
    r"SignatureDoesNotMatch|ExpiredToken|InvalidToken|RefreshError|\b40[13]\b"
)


def is_address(where: str) -> bool:
    """Whether it is an address such as `s3://bucket/a.tar`, and no path of this machine."""
    return _ADDRESS.match(where) is not None


def is_whole_bucket(where: str) -> bool:
    """Whether an address of a cloud names nothing in a bucket, in which there may be anything."""
    return _client_of(where) is not None and "/" not in where.partition("://")[2].strip("/")


def describe_missing(error: ImportError, where: str) -> str:
    """What to install where the client of an address is missing."""
    client, told = _client_of(where), str(error).rstrip(".")
    return f"{told}: pip install {client}." if client is not None and client in told else f"{told}."


def reason_of(error: BaseException) -> str:
    """What an error says, in one line, with its kind."""
    text = " ".join(str(error).split())
    return f"{text or 'no reason is told'} ({type(error).__name__})."


def advise(where: str, error: BaseException) -> str:
    """What to do about an error that a client raised of an address; "" where it says so itself."""
    client, told = _client_of(where), reason_of(error)
    if isinstance(error, FileNotFoundError) and client is not None:
        bucket = where.partition("://")[2].partition("/")[0]
        return f"There is no bucket {bucket!r}, or none that you may see: make it, or name another."
    if isinstance(error, ValueError) or "nvalid bucket name" in told:
        return ""
    if _REFUSED.search(told):
        how = f": {_LOGIN[client]}" if client is not None else ""
        return f"Log in as somebody who may list, read and write there{how}."
    return "Most often that passes: try the same again once it answers."


def _client_of(where: str) -> str | None:
    return _CLIENTS.get(where.partition("://")[0].lower())
