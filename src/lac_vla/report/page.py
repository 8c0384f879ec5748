"""The reports share how a self-contained HTML page is written, and how a run's metadata is shown in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lac_vla.errors import InputError, MissingExtraError
from lac_vla.files import write_whole


def write_page(template: str, out: Path, **context: Any) -> Path:
    """Fill a file of ``templates`` and write the page; it appears under its name only when it is whole.

    Raises:
        InputError: If the page cannot be written.
        MissingExtraError: If jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtraError("report", "The HTML report") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lac_vla.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = _with_contents(environment.get_template(template).render(**context))
    try:
        write_whole(out, page.encode("utf-8", "replace"))
    except OSError as error:
        raise InputError(f"cannot write {out} ({error}): choose another place") from error
    return out


def _with_contents(page: str) -> str:
    """Number the sections, and list them where the page has its contents."""
    links: list[str] = []

    def number(heading: re.Match[str]) -> str:
        links.append(f'<a href="#s{len(links)}"{heading["run"] or ""}>{heading["title"]}</a>')
        return f'<h2 id="s{len(links) - 1}"{heading["run"] or ""}>{heading["title"]}</h2>'

    page = re.sub(r'<h2(?P<run> class="run")?>(?P<title>.*?)</h2>', number, page)
    return page.replace('<nav aria-label="Contents">', '<nav aria-label="Contents">' + "".join(links), 1)


def metadata_groups(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Group what was recorded of a run; every group has rows of name and value."""
    groups: dict[str, Any] = {
        "Run": {key: metadata.get(key) for key in ("command", "created", "commit") if metadata.get(key)},
        "Model": metadata.get("model"),
        "Simulator": metadata.get("simulator"),
        "Hardware": metadata.get("hardware"),
        "Versions": metadata.get("versions"),
    }
    return [{"name": name, "rows": _pairs(group)} for name, group in groups.items() if group]


def setting(metadata: Mapping[str, Any]) -> str:
    """Name the machine that numbers hold for, in one line."""
    hardware = metadata.get("hardware")
    known = hardware if isinstance(hardware, Mapping) else {}
    parts = [str(known[key]) for key in ("accelerator", "processor") if known.get(key)]
    parts += [f"{known[key]} {key}" for key in ("cores", "threads") if known.get(key)]
    return ", ".join(parts)


def _pairs(group: Any) -> list[tuple[str, str]]:
    if not isinstance(group, Mapping):
        return [("", str(group))]
    return [(str(key).replace("_", " "), _text(value)) for key, value in group.items() if value is not None]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
