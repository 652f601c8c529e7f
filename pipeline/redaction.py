"""What may be shown and stored: URIs without passwords, messages without the secrets that a process was given."""

import os
import re
from urllib.parse import unquote

_USER_INFO = (
    r"(?<=://)(?:[^/?#{end}]*@"
    r"|[^/?#:\[{end}]*:(?!\d*(?:[/?#]|$))[^@{end}]*@"
    r"|(?<!http://)(?<!https://)[^/?#:\[{end}]*:[^@{end}]*@)"
)
"""Up to the "@" before the path. A database's password may hold a "/" (SQLAlchemy's ``make_url`` takes all up to the
"@" for it); in a server's address, digits before a "/" are a port."""
_OF_URI = re.compile(_USER_INFO.format(end=""))
_IN_TEXT = re.compile(_USER_INFO.format(end=r"\s'\""))
_AUTHORIZATION = re.compile(r"\b(Basic|Bearer) +\S+")
_SECRET_NAMES = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIAL|API_KEY|ACCESS_KEY", re.IGNORECASE)
_SHORTEST_SECRET = 6  # characters; "true" and numbers are settings


def redact(uri: str) -> str:
    """A URI without user, password and query, which may hold them too."""
    if uri.startswith("sqlite"):
        return uri
    if "://" not in uri:
        return uri.rpartition("@")[2]
    return _OF_URI.sub("", uri).partition("?")[0]


def without_user_info(text: str) -> str:
    """A text, whatever it says, without users and passwords of the URIs in it."""
    return _IN_TEXT.sub("", text)


def redact_arguments(arguments: list[str]) -> list[str]:
    """A command's arguments as they may be recorded."""
    shown = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        shown.append(f"{key}={redact(value)}" if equals and key == "tracking.uri" else without_user_info(argument))
    return shown


def user_info(uri: str) -> tuple[str, str] | None:
    """User and password of a URI, decoded; None where it has none."""
    found = None if uri.startswith("sqlite") else _OF_URI.search(uri)
    if found is None:
        return None
    user, _, password = found[0].removesuffix("@").partition(":")
    return unquote(user), unquote(password)


def without_secrets(text: str, uri: str = "") -> str:
    """A message without what ``uri`` and the environment's secrets hold; libraries repeat both in their errors."""
    text = without_user_info(text.replace(uri.rstrip("/"), redact(uri).rstrip("/")) if uri else text)
    text = _AUTHORIZATION.sub(r"\1 ***", text)
    secrets = [value for name, value in os.environ.items() if _SECRET_NAMES.search(name)]
    if info := user_info(uri):
        given = _OF_URI.findall(uri)[0].removesuffix("@").partition(":")[2]
        secrets += [info[1], given]  # decoded, and as given
    secrets.append(uri.partition("?")[2])
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text
