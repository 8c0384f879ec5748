"""``lac view``: opens a server's live page in the browser, or says why there is none."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
import webbrowser
from http import HTTPStatus
from http.client import HTTPException
from urllib.parse import urlsplit

from lac_vla.errors import InputError

SCHEMES = {"ws": "http", "wss": "https", "http": "http", "https": "https"}
TIMEOUT = 10.0
"""Seconds to wait for the server."""


def open_page(url: str) -> str:
    """Open the live page of the server at ``url``, as robots are told it, and return a line for the user.

    Raises:
        InputError: If this is no such address, nothing answers there, the page is off, or there is no browser.
    """
    address = page_address(url)
    server = address.removesuffix("/view")
    if _status(server + "/healthz", server) != HTTPStatus.OK:
        raise InputError(
            f"what answers at {server} is no policy server; start one with: lac serve --model MODEL --view"
        )
    status = _status(address, server)
    if status == HTTPStatus.NOT_FOUND:
        raise InputError(f"the server at {server} runs with its page off; start it with: lac serve … --view")
    if status == HTTPStatus.FORBIDDEN:
        raise InputError(
            f"the server at {server} has no API key, and shows its page as localhost or 127.0.0.1 alone; "
            "set LAC_API_KEY where it runs"
        )
    if status not in (HTTPStatus.OK, HTTPStatus.UNAUTHORIZED):
        raise InputError(f"the server at {server} answers {status}; its log tells more")
    login = "; log in with any user name, and the API key as the password" if status == HTTPStatus.UNAUTHORIZED else ""
    if not webbrowser.open(address):
        raise InputError(f"no browser here; open {address} in one{login}")
    return f"live page: {address}{login}"


def page_address(url: str) -> str:
    """Return the address of a server's page.

    Raises:
        InputError: If ``url`` is no server's address.
    """
    wrong = f"{url!r} is no server's address; give ws://HOST:PORT or wss://HOST:PORT"
    try:
        parts = urlsplit(url if "://" in url else f"ws://{url}")
        usable = parts.scheme in SCHEMES and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError as error:  # brackets that do not close, a port that is no number
        raise InputError(wrong) from error
    if not usable or parts.path not in ("", "/", "/view") or parts.query or parts.fragment:
        raise InputError(wrong)
    return f"{SCHEMES[parts.scheme]}://{parts.netloc}/view"


def _status(address: str, server: str) -> int:
    """Return the status of a GET request."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        advice = "start one with: lac serve --model MODEL --view"
        if isinstance(reason, ssl.SSLCertVerificationError):
            advice = "name the certificate's authority in SSL_CERT_FILE"
        raise InputError(f"no server to be talked to at {server} ({reason}); {advice}") from error
