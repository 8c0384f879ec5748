"""Count how often the scripted expert takes a target that slides: ``python scripts/expert_moving.py OUT.jsonl``.

It plays tasks of LIBERO-Spatial at 20 Hz, without rendering, under the disturbance of ``lac eval --stress moving``: the
same ways for the same seed. Every episode is a line of the file, and those that are there are not played again.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import tyro
from tqdm import tqdm

from lac_vla.evaluation.stress import episode_generator
from lac_vla.sims.libero.env import LiberoEnv
from lac_vla.sims.libero.expert import ScriptedExpert


def play(env: LiberoEnv, init_state: int, speed: float, seed: int) -> dict[str, object]:
    """Play one episode until it is solved or the suite's horizon is over."""
    env.restart(init_state, seed)
    if speed:
        env.slide_target(speed, episode_generator(seed, env.suite, env.task, init_state))
    steps, solved = 0, False
    for action in ScriptedExpert(env).actions():
        if solved or steps == env.horizon:
            break
        solved, steps = env.advance(action), steps + 1
    trial = {"task": env.task, "init_state": init_state, "speed": speed, "seed": seed}
    return {**trial, "solved": solved, "steps": steps, **env.outcome()}


def main(
    out: tyro.conf.Positional[Path],
    tasks: tuple[int, ...] = tuple(range(10)),
    states: tuple[int, ...] = (40, 41),
    speeds: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05),
    seed: int = 0,
) -> None:
    """Play what is missing and print a line for every speed.

    Args:
        out: File of the episodes, one a line.
        tasks: Tasks of LIBERO-Spatial.
        states: Initial states of every task.
        speeds: Metres a second.
        seed: Seed of the directions and of the scenes.
    """
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    there = {(row["task"], row["init_state"], row["speed"], row["seed"]) for row in rows}
    with tqdm(total=len(tasks) * len(states) * len(speeds), unit="episode") as bar:
        for task in tasks:
            jobs = [(state, speed) for state in states for speed in speeds]
            missing = [job for job in jobs if (task, *job, seed) not in there]
            bar.update(len(jobs) - len(missing))
            if not missing:
                continue
            with closing(LiberoEnv("libero_spatial", task, resolution=16)) as env, out.open("a") as log:
                for state, speed in missing:
                    rows.append(play(env, state, speed, seed))
                    log.write(json.dumps(rows[-1]) + "\n")
                    log.flush()
                    bar.update()
    for speed in speeds:
        played = [row for row in rows if row["speed"] == speed and row["seed"] == seed]
        steps = [row["steps"] for row in played if row["solved"]]
        mean = f", {sum(steps) / len(steps):.0f} steps" if steps else ""
        print(f"{100 * speed:g} cm/s: {len(steps)} of {len(played)} solved{mean}")


if __name__ == "__main__":
    tyro.cli(main)
