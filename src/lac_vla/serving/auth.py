"""Access to the server: this machine alone, or everybody who holds the key."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import os
import ssl
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from lac_vla.client import KEY_VARIABLE
from lac_vla.errors import InputError

MIN_KEY = 16
"""Characters of a key."""
SINGLE = (
    "authorization", "content-length", "content-type", "date", "expect", "from", "host", "if-modified-since",
    "if-range", "if-unmodified-since", "max-forwards", "origin", "proxy-authorization", "range", "referer",
    "sec-websocket-key", "sec-websocket-version", "user-agent",
)  # fmt: skip
"""Headers of a request that are no lists (RFC 9110, 6454 and 6455)."""


def read_key(file: Path | None) -> str | None:
    """Read the API key: a file's first line, else the environment's; ``None`` if there is neither.

    Raises:
        InputError: If the file cannot be read, or the key is too short or cannot stand in a header.
    """
    if file is None:
        key, source = os.environ.get(KEY_VARIABLE, ""), KEY_VARIABLE
        if not key:
            return None
    else:
        source = str(file)
        try:
            key = file.read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the API key from {file}: {error}") from error
    if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"the API key in {source} must be at least {MIN_KEY} ASCII characters without spaces")
    return key


def allowed(header: str | None, key: str | None) -> bool:
    """Tell whether an ``Authorization`` header shows the key, in a time that does not depend on how much is right."""
    if key is None:
        return True
    return hmac.compare_digest((header or "").encode("utf-8", "replace"), f"Api-Key {key}".encode())


def browser_allowed(header: str | None, key: str | None) -> bool:
    """Tell whether a browser shows the key, as in :func:`allowed` or as the password of HTTP Basic."""
    scheme, _, credentials = (header or "").partition(" ")
    if key is None or scheme.lower() != "basic":
        return allowed(header, key)
    try:
        password = base64.b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return False
    return hmac.compare_digest(password, key.encode())


def repeated_header(names: Iterable[str]) -> str | None:
    """Find a header that a request has twice, of which nobody can tell which one is meant; ``None`` if none is.

    All but :data:`SINGLE` may be spread over several lines, as proxies do (RFC 9110, section 5.3).
    """
    seen: set[str] = set()
    for name in map(str.lower, names):
        if name in seen and name in SINGLE:
            return name.title()
        seen.add(name)
    return None


def names_this_machine(host: str | None) -> bool:
    """Tell whether a ``Host`` header says that the browser meant this machine.

    A web page elsewhere can make its own name point here, and its reader's browser then takes our answers for its own:
    without a key, the name alone tells the two apart.
    """
    try:
        name = urlsplit(f"//{host or ''}").hostname
    except ValueError:
        return False
    return name is not None and is_loopback(name)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, key: str | None) -> None:
    """Refuse to listen to the world without a key.

    Raises:
        InputError: If the address is not a loopback one and there is no key.
    """
    if not is_loopback(host) and key is None:
        raise InputError(
            f"{host} is reachable from other machines: set {KEY_VARIABLE} or --api-key-file, or listen on 127.0.0.1"
        )


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Load TLS settings from PEM files; ``None`` without a certificate.

    Raises:
        InputError: If one of the two files is missing, or they are not a certificate and its key.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise InputError("TLS needs both --tls-cert and --tls-key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"cannot use {certificate} with {key} for TLS: {error}") from error
    return context
