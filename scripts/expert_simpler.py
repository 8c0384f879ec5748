"""The scripted expert on all layouts of SIMPLER's WidowX tasks, ManiSkill3's port, without pictures: success by task.

It takes one word, ManiSkill3's folder; by default MS_ASSET_DIR of the environment.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lac_vla.sims.simpler.actions import WidowXActions
from lac_vla.sims.simpler.env import SimplerEnv
from lac_vla.sims.simpler.episode import EpisodeSpec
from lac_vla.sims.simpler.expert import WidowXExpert
from lac_vla.sims.simpler.ms3 import Ms3Backend
from lac_vla.sims.simpler.protocol import tasks


class Blind(Ms3Backend):
    """Without pictures an episode takes a third of the time."""

    def _make(self, episode: EpisodeSpec) -> None:
        super()._make(episode)
        nothing = {"sensor_data": {episode.robot.camera: {"rgb": torch.zeros((1, 2, 2, 3), dtype=torch.uint8)}}}
        self._env.unwrapped.get_obs = lambda *_, **__: nothing


def main() -> None:
    """Play every episode to its horizon, and count those that are solved at the last step."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    for task, spec in enumerate(tasks("widowx")):
        env = SimplerEnv("widowx", task, Blind(folder=folder), WidowXActions())
        solved, seconds = 0, []
        for episode in tqdm(env.episodes, desc=spec.name, leave=False):
            began, success = time.process_time(), False
            env.reset(episode.number)
            for _, action in zip(range(env.horizon), WidowXExpert(task, env.backend.scene).actions(), strict=False):
                _, success = env.step(action)
            solved += success
            seconds.append(time.process_time() - began)
        print(f"{spec.name}: {solved} of {len(env.episodes)}, {statistics.median(seconds):.1f} CPU s an episode")
        env.close()


if __name__ == "__main__":
    main()
