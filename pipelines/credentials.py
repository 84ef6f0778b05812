"""Credentials come from the environment. They are not part of an address, not shown, and not sent to another host."""

import base64
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any
from urllib.parse import quote, urlsplit

from maskformer.untrusted import escaped
from pipelines.errors import UserError

SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
    "PGPASSWORD",
    "MYSQL_PWD",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_CLIENT_SECRET",
    "REDIS_PASSWORD",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
)
"""Environment variables whose values are secret."""

_LEAST_SECRET = 8
"""Characters of a value that is hidden wherever it occurs. A shorter one could be a word of an ordinary text."""

_HIDDEN = "***"
_WORD = re.compile(r"[^\s'\"]+")
_ALONE = re.compile(r"(?:--?[\w.-]{1,100}=)?@?[a-z][a-z0-9+.-]{0,40}://.*", re.IGNORECASE | re.DOTALL)
_SCHEME = re.compile(r"[a-z0-9+.-]{1,40}$", re.IGNORECASE)
_PATH = re.compile(r"[/?#]")
_PORT = re.compile(r"\d*([/?#]|$)")
_PARAMETER = re.compile(r"(?P<name>[?&;#](?P<key>[\w.%-]{1,100})=)[^&#\s'\"]+")
_SECRET_KEY = re.compile(
    r"passw(?:or)?d|passwd|pwd|passphrase|token|secret|signature|credential|access_?key|api_?key"
    r"|^(?:pass|sig|key|auth|odbc_connect)$",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(?P<name>\b(?:x-ray-|proxy-)?authorization\b['\"]?\s*[:=]\s*(?:b(?=['\"]))?['\"]?)[^\s'\"][^\r\n'\"]*", re.I
)
_REDIRECTS = (301, 302, 303, 307, 308)
_AZURE = ("abfs", "abfss", "wasb", "wasbs")

_REMEDIES = {
    "s3": "Set $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, or use a profile or role",
    "http": (
        "Set $MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD, or $MLFLOW_TRACKING_TOKEN, for MLflow, and "
        "$RAY_AUTH_TOKEN for Ray"
    ),
    "postgresql": "Set $PGUSER and $PGPASSWORD, or run an MLflow server before the database",
    "mysql": "Put them into a file and name it by ?read_default_file=FILE, or run an MLflow server before the database",
    "gs": "Set $GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "Set $AZURE_CLIENT_ID, $AZURE_TENANT_ID and $AZURE_CLIENT_SECRET",
}
_OTHER_REMEDY = "Leave it out; credentials are read from the environment only"


def has_credentials(text: str) -> bool:
    """Return whether a URI in `text` has a user name, a password, a key or a token in it."""
    if any(True for _ in _users(text)):
        return True
    uris = (word[0].partition("://")[2] for word in _words(text))
    return any(_SECRET_KEY.search(found["key"]) for uri in uris for found in _PARAMETER.finditer(uri))


def refuse_credentials(uri: str, what: str = "The address") -> None:
    """Refuse an address with a user name, password, key or token in it, before it is stored, contacted or shown.

    Args:
        what: what the address is of, for the message.

    Raises:
        UserError: it has.
    """
    if not has_credentials(uri):
        return
    scheme = re.search(r"([a-z][a-z0-9+.-]*)://", uri, re.IGNORECASE)
    name = scheme[1].lower().partition("+")[0] if scheme else ""
    name = {"https": "http", "postgres": "postgresql", "s3a": "s3", "gcs": "gs", "abfss": "abfs"}.get(name, name)
    raise UserError(
        f"{what} {escaped(redacted(uri))} has a user name, password, key or token in it, which would be stored and "
        f"shown. {_REMEDIES.get(name, _OTHER_REMEDY)}, and give the address without it."
    )


def redacted(text: str) -> str:
    """Return `text` without secrets: those in URIs and Authorization headers, and values of `SECRET_VARIABLES`."""
    for name, value in _secrets():
        text = text.replace(value, f"[${name}]")
    kept, end = [], 0
    for start, stop in _users(text):
        kept.append(text[end:start])
        end = stop
    text = "".join([*kept, text[end:]])
    text = _PARAMETER.sub(lambda found: found["name"] + _HIDDEN if _SECRET_KEY.search(found["key"]) else found[0], text)
    return _HEADER.sub(rf"\g<name>{_HIDDEN}", text)


def without_secrets(value: Any) -> Any:
    """Return a JSON-able value, all of whose texts are `redacted`."""
    if isinstance(value, dict):
        return {key: without_secrets(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    return redacted(value) if isinstance(value, str) else value


def open_url(request: str | urllib.request.Request, timeout: float, direct: bool = False) -> HTTPResponse:
    """Request an http:// or https:// URL. A redirect is not followed: what the request carries is for its host only.

    Args:
        direct: do not use the proxies of the environment.

    Raises:
        urllib.error.HTTPError: the status is not a success. `redirect` tells whether it is a redirect.
        OSError: there is no answer.
    """
    proxies = urllib.request.ProxyHandler({} if direct else None)
    return urllib.request.build_opener(_NoRedirects, proxies).open(request, timeout=timeout)


def redirect(status: int, location: str | None) -> str:
    """Return where an HTTP answer redirects to, as scheme and host, or as a path; empty if this is no redirect.

    Args:
        location: the header of that name.
    """
    if status not in _REDIRECTS or not location:
        return ""
    try:
        target = urlsplit(location)
    except ValueError:
        return "another address"
    where = redacted(f"{target.scheme}://{target.netloc}") if target.netloc else target.path
    return escaped(where, 200) or "another address"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _words(text: str) -> Iterator[re.Match[str]]:
    """Yield the parts of a text that may have a URI in them; all of it if it is one, whose password may have blanks."""
    alone = _ALONE.fullmatch(text)
    return _WORD.finditer(text) if alone is None else iter([alone])


def _users(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each user name and password in the URIs of a text, with the @ behind it.

    The text may be hostile, so the time is proportional to its length.
    """
    for word in _words(text):
        last, start = text.rfind("@", word.start(), word.end()), word.start()
        while last >= 0 and (mark := text.find("://", start, last)) >= 0:
            start = mark + 3
            scheme = _SCHEME.search(text, max(word.start(), mark - 40), mark)
            if scheme and (end := _end_of_user(scheme[0].lower(), text, start, last)) > start:
                yield start, end
                start = end


def _end_of_user(scheme: str, text: str, start: int, last: int) -> int:
    """Return where the user name and password of a URI end; `start` if it has none.

    Args:
        start: of what follows the scheme.
        last: place of the last @ in the word.
    """
    found = _PATH.search(text, start, last)
    authority = found.start() if found else last + 1
    colon = text.find(":", start, authority)
    # A password may have characters that belong into no URI: what follows the colon is then no port. A secret key of S3
    # often has slashes, and a bucket has no port.
    if colon >= 0 and text[start] != "[" and (scheme == "s3" or not _PORT.match(text, colon + 1)):
        return last + 1
    end = text.rfind("@", start, authority) + 1
    user = text[start : end - 1]
    if (scheme in _AZURE and ":" not in user) or (scheme, user) == ("gs", "anonymous"):
        return start  # the name of a container, or an anonymous user
    return max(start, end)


def _secrets() -> Iterator[tuple[str, str]]:
    """Yield the secrets in the environment with the names of their variables, in all forms that they are written in."""
    for name in SECRET_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _LEAST_SECRET:
            yield from ((name, form) for form in dict.fromkeys((value, quote(value, safe=""), json.dumps(value)[1:-1])))
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    if password:
        yield "MLFLOW_TRACKING_PASSWORD", base64.b64encode(f"{user}:{password}".encode()).decode()
