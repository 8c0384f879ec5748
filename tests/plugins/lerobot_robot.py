"""A rollout by LeRobot, run by a Python that has it: python lerobot_robot.py MODEL FOLDER (one for scratch)."""

import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from lerobot import __version__
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.policies.factory import get_policy_class, make_policy, make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import rollout
from lerobot.utils.import_utils import register_third_party_plugins

STEPS = 5
SEEN = []


class Toy(gym.Env):
    """Shows noise of its own, and remembers it."""

    observation_space = gym.spaces.Dict(
        {
            "pixels": gym.spaces.Dict(
                {name: gym.spaces.Box(0, 255, (48, 64, 3), np.uint8) for name in ("top", "hand")}
            ),
            "agent_pos": gym.spaces.Box(-9, 9, (8,), np.float32),
        }
    )
    action_space = gym.spaces.Box(-9, 9, (7,), np.float32)
    metadata = {"render_fps": 10}  # noqa: RUF012
    _max_episode_steps = STEPS
    task_description = task = "pick up the bowl"

    def _look(self):
        rng = np.random.default_rng(self._at)
        still = np.random.default_rng(99).integers(60, 190, (48, 64, 3))
        pixels = {n: (still + rng.integers(-20, 21, still.shape)).astype(np.uint8) for n in ("top", "hand")}
        SEEN.append({"pixels": pixels, "agent_pos": rng.normal(size=8).astype(np.float32)})
        return SEEN[-1]

    def reset(self, *, seed=None, options=None):
        self._at = 0
        return self._look(), {}

    def step(self, action):
        self._at += 1
        return self._look(), 0.0, self._at == STEPS, False, {}


class ToyConfig(EnvConfig):
    gym_kwargs = {}  # noqa: RUF012


def main(model, scratch):
    from_lac = {"type": "lac_vla", "model": model, "policy": "random:ratio=0.5", "device": "cpu"}
    before = "lac_vla" in PreTrainedConfig.get_known_choices()
    register_third_party_plugins()
    config = PreTrainedConfig.get_choice_class("lac_vla")(
        model=model, policy="random:ratio=0.5", device="cpu",
        cameras={"agentview": "observation.images.top", "wrist": "observation.images.hand"},
    )  # fmt: skip
    picture = PolicyFeature(FeatureType.VISUAL, (48, 64, 3))
    names = {"pixels/top": "observation.images.top", "pixels/hand": "observation.images.hand", "action": "action"}
    env_config = ToyConfig(
        task="toy",
        features={"pixels/top": picture, "pixels/hand": picture, "action": PolicyFeature(FeatureType.ACTION, (7,))},
        features_map=names,
    )
    policy = make_policy(config, env_cfg=env_config)
    assert type(policy) is get_policy_class("lac_vla")
    pre, post = make_pre_post_processors(config)

    def play(policy, pre, post):
        env = gym.vector.SyncVectorEnv([Toy])
        plain = PolicyProcessorPipeline(steps=[])
        SEEN.clear()
        played = rollout(env, policy, plain, plain, pre, post)
        return played["action"][0].numpy()

    actions, again = play(policy, pre, post), play(policy, pre, post)

    # The same frames through the library.
    from lac_vla import CachedVLA, Frame, load_vla
    from lac_vla.factory import resolve_policy

    session = CachedVLA(load_vla(model), resolve_policy("random:ratio=0.5", model)).session()
    expected = []
    for _ in range(2):
        session.reset()
        for seen in SEEN[:STEPS]:
            images = {"agentview": seen["pixels"]["top"], "wrist": seen["pixels"]["hand"]}
            expected.append(session.act(Frame(images, "pick up the bowl", seen["agent_pos"])))

    # What LeRobot saves comes back.
    policy.save_pretrained(scratch)
    pre.save_pretrained(scratch)
    post.save_pretrained(scratch)
    loaded = PreTrainedConfig.from_pretrained(scratch)
    loaded.pretrained_path = Path(scratch)
    restored = make_policy(loaded, env_cfg=env_config)
    overrides = {"device_processor": {"device": "cpu"}, "rename_observations_processor": {"rename_map": {}}}
    processors = make_pre_post_processors(loaded, pretrained_path=scratch, preprocessor_overrides=overrides)
    kept = play(restored, *processors)

    complaints = []
    for wrong in (lambda: policy.forward({}), policy.get_optim_params, config.get_optimizer_preset):
        try:
            wrong()
        except NotImplementedError as error:
            complaints.append(str(error))
    np.savez(Path(scratch) / "actions.npz", actions=[*actions, *again], expected=expected, kept=kept)
    told = {"version": __version__, "before": before, "complaints": complaints}
    told |= {"cameras": loaded.cameras, "settings": all(getattr(loaded, k) == v for k, v in from_lac.items())}
    print(json.dumps(told))


main(*sys.argv[1:])
