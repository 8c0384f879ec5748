"""Print what a frame takes by every latency table, dense and where ``lac`` computes a fifth of the visual tokens.

``python scripts/device_tables.py`` prints rows of ``docs/realtime.md``: milliseconds without jitter, of two decoding
passes of a row each where a model decodes, and of a tower that looks at everything.
"""

from __future__ import annotations

from pathlib import Path

import lac_vla.realtime.device as device

FIFTH = 0.2


def milliseconds(table: device.DeviceTable, policy: str, share: float) -> float:
    """Read a frame off a table, of so large a share of the visual tokens."""
    passes = 2.0 if "openvla" in table.shape.families else 0.0
    units = {
        "host": {"fixed": 1.0},
        "flow": {"fixed": float(policy == "lac")},
        "policy": {policy: 1.0},
        "vision": {"fixed": 1.0, "per_share": 1.0},
        "projector": {"fixed": 1.0, "per_share": share},
        "prefill": {"fixed": 1.0, "per_share": share},
        "decode": {"per_pass": passes, "per_row": passes},
        "head": {"fixed": 1.0},
    }
    return table.milliseconds(units)


if __name__ == "__main__":
    for file in sorted((Path(device.__file__).parent / "devices").glob("*.json")):
        table = device.DeviceTable.read(file)
        dense, lac = milliseconds(table, "dense", 1.0), milliseconds(table, "lac", FIFTH)
        print(f"| `{table.name}` | {table.kind} | {dense:.0f} | {lac:.0f} |")
