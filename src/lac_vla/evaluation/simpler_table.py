"""A run on SIMPLER as the benchmark's published table, for files and for the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lac_vla.errors import InputError
from lac_vla.results.format import percent
from lac_vla.sims.simpler.table import Outcome, cells, label

EPISODES, TABLE = "episodes.jsonl", "simpler.json"


def tables(run: Path) -> dict[str, Any]:
    """A run as SIMPLER's table: its title, why it may be none, and one row of cells per method.

    Raises:
        InputError: If the run holds no episode of SIMPLER.
    """
    methods: dict[str, list[Outcome]] = {}
    for text in (run / EPISODES).read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        methods.setdefault(line["method"], []).append(Outcome.from_json(line))
    if not methods:
        raise InputError(f"{run} holds no finished episode: let the run go on, or resume it")
    setup = next(iter(methods.values()))[0].setup
    named = label(setup, methods)
    rows = {
        name: {
            "last_step": [asdict(cell) for cell in cells(setup, outcomes)],
            "any_step": [asdict(cell) for cell in cells(setup, outcomes, any_step=True)],
        }
        for name, outcomes in methods.items()
    }
    return {"setup": setup, "title": named.title, "reasons": list(named.reasons), "methods": rows}


def terminal_table(run: Path) -> Table:
    """A run's table for the terminal, one column per method."""
    content = tables(run)
    notes = [f"- {reason}" for reason in content["reasons"]]
    table = Table(title=content["title"], box=box.SIMPLE, caption="\n".join(notes) or None, caption_justify="left")
    table.add_column("last step (any step), played / of")
    rows = content["methods"]
    for name in rows:
        table.add_column(name, justify="right")
    for k, cell in enumerate(next(iter(rows.values()))["last_step"]):
        values = []
        for row in rows.values():
            last, some = row["last_step"][k], row["any_step"][k]
            values.append(f"{percent(last['value'])} ({percent(some['value'])}) {last['played']}/{last['of']}")
        table.add_row(cell["name"], *values)
    return table
