"""Secrets have no place in a path or URL that a spec holds: specs are kept, logged, shown and shared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from gendist.errors import UserError

# The names of parameters that hold a key, a token, a signature or a password, as clouds and their libraries call them.
NAME_OF_A_SECRET = re.compile(
    r"secret|token(?!i[sz])|passw|passphrase|credential|signature|bearer|(api|access|account|private|shared)_?key"
    r"|(^|[_-])(sig|key|auth|authorization|jwt|sas|pwd|pass)($|[_-])"
)

# In a key before the host there may be what ends a host for `urlsplit`: half of all AWS keys hold a slash. A number is a port.
KEY_BEFORE_HOST = re.compile(r"://[^/?#@\[:]*:(?!:|\d{1,5}(?:[/?#]|$))[^@]*@")


def secret_in_url(url: str) -> str | None:
    """What in a path or URL looks like a secret, by its name and without its value; None where nothing does.

    A password, or a user's key in front of the host (`s3://KEY:SECRET@bucket`), and over HTTP any name there, which may be a
    token (`https://TOKEN@host`); a parameter of a signed address
    (`?X-Amz-Signature=...`, `?sig=...`).
    """
    if "://" not in url:
        return None
    # Chained ones, such as `simplecache::s3://...`, have several; what is behind a bracket that is not closed is no host.
    for part in url.split("::"):
        if KEY_BEFORE_HOST.search(part):
            return "a password before the host"
        try:
            split = urlsplit(part)
        except ValueError:
            continue
        user, at, _ = split.netloc.rpartition("@")
        if ":" in unquote(user):
            return "a password before the host"
        if at and split.scheme in ("http", "https"):
            return "a user before the host"
        for query in (split.query, split.fragment):
            for name, value in parse_qsl(query):
                if value and NAME_OF_A_SECRET.search(_in_snake_case(name)):
                    return f"the parameter {name}"
    return None


def _in_snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def without_secrets(url: str) -> str:
    """What may be shown of it: all but what stands before the host and in the query."""
    if key := KEY_BEFORE_HOST.search(url):
        url = url[: key.start()] + "://" + url[key.end() :]
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    netloc, slash, path = rest.partition("/")
    return scheme + separator + netloc.rpartition("@")[2].partition("?")[0] + slash + re.split(r"[?#]", path, maxsplit=1)[0]


def require_no_secret(url: str, key: str) -> str:
    """The URL; UserError, in which no secret stands, where there seems to be one in it.

    key  of the spec that holds it, or the option
    """
    found = secret_in_url(url)
    if found is not None:
        raise UserError(
            f"{key}: {without_secrets(url)} comes with {found}, and would be kept with the run and shown; leave it out and "
            "give keys by the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return url


def require_no_secrets(content: Any, key: str = "") -> None:
    """The same of every text in plain mappings, lists and texts."""
    if isinstance(content, str):
        require_no_secret(content, key)
    elif isinstance(content, Mapping):
        for name, inside in content.items():
            require_no_secrets(inside, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list | tuple):
        for inside in content:
            require_no_secrets(inside, key)
