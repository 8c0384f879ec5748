"""Count which LIBERO tasks the scripted expert solves: ``python scripts/expert_libero.py OUT.jsonl``.

It plays demonstrations as ``lac collect`` does, with its noise on executed actions, but without rendering. Every
attempt is a line of the file, and those that are there are not played again. At the end it prints a table.
"""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import tyro
from tqdm import tqdm

from lac_vla.sims.libero.benchmark import Libero
from lac_vla.sims.libero.demonstration import demonstrate
from lac_vla.sims.libero.env import LiberoEnv
from lac_vla.sims.libero.expert import UNSOLVED
from lac_vla.sims.libero.suites import HORIZONS, N_TASKS


def main(
    out: tyro.conf.Positional[Path],
    suites: tuple[str, ...] = tuple(HORIZONS),
    tasks: tuple[int, ...] = tuple(range(N_TASKS)),
    states: tuple[int, ...] = (0, 1, 2),
    seed: int = 0,
) -> None:
    """Play what is missing and print the table.

    Args:
        out: File of the attempts, one a line.
        suites: LIBERO's suites.
        tasks: Tasks of each.
        states: Initial states of every task.
        seed: Seed of the noise and of the scenes.
    """
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    there = {(row["suite"], row["task"], row["init_state"], row["seed"]) for row in rows}
    played = [(suite, task) for suite in suites for task in tasks if (suite, task) not in UNSOLVED]
    with tqdm(total=len(played) * len(states), unit="attempt") as bar:
        for suite, task in played:
            missing = [state for state in states if (suite, task, state, seed) not in there]
            bar.update(len(states) - len(missing))
            if not missing:
                continue
            with closing(LiberoEnv(suite, task, resolution=16)) as env, out.open("a") as log:
                for state in missing:
                    demo = demonstrate(env, state, seed=seed, images=False)
                    trial = {"suite": suite, "task": task, "init_state": state, "seed": seed, "sigma": demo.sigma}
                    rows.append({**trial, "solved": demo.solved, "steps": len(demo)})
                    log.write(json.dumps(rows[-1]) + "\n")
                    log.flush()
                    bar.update()
    attempts = defaultdict(list)
    for row in rows:
        attempts[row["suite"], row["task"]].append(row)
    print("| task | | solved | steps |\n|---|---|---|---|")
    for suite in suites:
        instructions = Libero(suite).instructions()
        for task in tasks:
            steps = [row["steps"] for row in attempts[suite, task] if row["solved"]]
            mean = f"{sum(steps) / len(steps):.0f}" if steps else ""
            print(f"| {suite} {task} | {instructions[task]} | {len(steps)} of {len(attempts[suite, task])} | {mean} |")


if __name__ == "__main__":
    tyro.cli(main)
