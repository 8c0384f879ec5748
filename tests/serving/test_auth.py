"""Keys, addresses, certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from lac_vla import InputError
from lac_vla.client import KEY_VARIABLE
from lac_vla.serving.auth import allowed, check_exposure, is_loopback, read_key, tls_context

KEY = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "robot.local", "", "localhost.evil.org"])
def test_the_rest_of_the_world(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(InputError, match="api-key-file"):
        check_exposure(host, None)
    check_exposure(host, KEY)


@pytest.mark.parametrize(
    ("header", "passes"),
    [(f"Api-Key {KEY}", True), (None, False), ("", False), (KEY, False), (f"Bearer {KEY}", False),
     (f"Api-Key {KEY}x", False), (f"Api-Key {KEY[:-1]}", False), ("Api-Key é", False)],
)  # fmt: skip
def test_headers(header: str | None, passes: bool) -> None:
    assert allowed(header, KEY) is passes
    assert allowed(header, None)


def test_where_the_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert read_key(None) == KEY
    file = tmp_path / "key"
    file.write_text(KEY[::-1] + "\nnot this\n")
    assert read_key(file) == KEY[::-1]
    for wrong in ("short", "with spaces in the key", "é" * 20):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(InputError, match="at least 16"):
            read_key(file)
    with pytest.raises(InputError, match="cannot read"):
        read_key(tmp_path / "nowhere")


def test_certificates_that_do_not_fit(tmp_path: Path) -> None:
    assert tls_context(None, None) is None
    with pytest.raises(InputError, match="both"):
        tls_context(tmp_path / "cert", None)
    (tmp_path / "cert").write_text("")
    with pytest.raises(InputError, match="for TLS"):
        tls_context(tmp_path / "cert", tmp_path / "cert")
