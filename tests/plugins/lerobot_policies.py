"""LeRobot's own policies beside the plug-in, run by a Python that has LeRobot: python lerobot_policies.py FOLDER….

Every folder is a tiny checkpoint of LeRobot's. What was found goes to standard output, a JSON object, its last line.
"""

import json
import sys
import time
from argparse import ArgumentError
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lerobot import __version__
from lerobot.configs import parser
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from transformers import PreTrainedTokenizerFast

from lac_vla import Frame, load_vla
from lac_vla.bench.lerobot_policy import OpenedPolicy
from lac_vla.session import head_rng

FRAMES = 3


@dataclass
class Main:
    policy: PreTrainedConfig | None = None

    @classmethod
    def __get_path_fields__(cls):
        return ["policy"]


def configured(*arguments):
    """The policy's settings as a command of LeRobot reads them."""

    @parser.wrap()
    def main(config: Main):
        return config.policy

    sys.argv = ["command", "--policy.discover_packages_path=lac_vla.lerobot", *arguments]
    return main()


def frames(vla, count=FRAMES):
    """Pictures whose neighbours differ a little."""
    rng = np.random.default_rng(5)
    still = {name: rng.integers(40, 200, (60, 80, 3)) for name in vla.grids}
    for _ in range(count):
        images = {name: (part + rng.integers(-9, 10, part.shape)).astype(np.uint8) for name, part in still.items()}
        yield Frame(images, "pick up the black bowl", rng.normal(size=5).astype(np.float32))


def apart(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare(folder):
    """Chunks and executed actions of both, on the same observations and noise."""
    vla = load_vla(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder, "tokenizer.json")))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(2 if vla.family == "smolvla" else 0)
    theirs = OpenedPolicy(Path(folder), vla, tokenizer)
    told = {"steps": theirs.policy.config.n_action_steps}

    def open_ours(caching, **options):
        extra = [f"--policy.{name}={value}" for name, value in options.items()]
        config = configured(
            "--policy.type=lac_vla", f"--policy.pretrained_path={folder}", f"--policy.policy={caching}",
            "--policy.device=cpu", *extra,
        )  # fmt: skip
        policy = get_policy_class(config.type).from_pretrained(config.pretrained_path, config=config)
        return policy, *make_pre_post_processors(config, pretrained_path=config.pretrained_path)

    rng = head_rng(0)
    noise = lambda shape, device: torch.from_numpy(rng.standard_normal(shape[1:], dtype=np.float32))[None]  # noqa: E731
    theirs.policy.model.sample_noise = noise
    for name, caching, options in (
        ("dense", "dense", {}),
        ("bare", "dense", {"options": "none", "self_check": "false"}),
        ("reuse", "random:ratio=0.5", {}),
    ):
        rng = head_rng(0)
        policy, before, after = open_ours(caching, **options)
        differences = []
        for frame in frames(vla):
            batch = theirs.batch(frame, list(vla.grids))
            expected = theirs.after(theirs.policy.predict_action_chunk(theirs.before(dict(batch))))
            differences.append(apart(after(policy.predict_action_chunk(before(dict(batch)))), expected))
        told[name] = differences
        told[f"{name}_ratio"] = policy.bridge.last_info.ratio
        told[f"{name}_fault"] = policy.bridge.fault
    # the queue: LeRobot's own number of steps, one question for all of them
    rng, differences = head_rng(0), []
    policy, before, after = open_ours("dense")
    assert policy.config.n_action_steps == told["steps"]
    theirs.policy.reset()
    for frame in frames(vla, told["steps"] + 2):
        batch = theirs.batch(frame, list(vla.grids))
        expected = theirs.after(theirs.policy.select_action(theirs.before(dict(batch))))
        differences.append(apart(after(policy.select_action(before(dict(batch)))), expected))
    told["queue"] = differences
    told["supports_rtc"] = policy.supports_rtc()
    told["rtc"] = real_time(vla, *open_ours("random:ratio=0.5"))
    return told


def real_time(vla, policy, before, after):
    """LeRobot's own engine for real-time chunking drives a robot that stands still."""
    try:
        from lerobot.policies.rtc import RTCConfig
        from lerobot.rollout.inference.rtc import RTCInferenceEngine, supports_rtc_inference
    except ImportError as error:
        return {"missing": str(error)}
    assert supports_rtc_inference(policy)
    [frame] = frames(vla, 1)
    names = [f"joint{number}.pos" for number in range(5)]
    features = {"observation.state": {"dtype": "float32", "shape": (5,), "names": names}}
    for name in vla.grids:
        features[f"observation.images.{name}"] = {"dtype": "image", "shape": (60, 80, 3), "names": None}
    rtc = RTCConfig(execution_horizon=6)
    policy.config.rtc_config = rtc
    asked = []
    whole = policy.predict_action_chunk

    def spy(batch, **given):
        left = given["prev_chunk_left_over"]
        chunk = whole(batch, **given)
        delay, count = given["inference_delay"], 0 if left is None else len(left)
        real = 0 if left is None else int(left.any(dim=1).sum())  # LeRobot fills up with zeros
        frozen = min(delay, real, chunk.shape[1] - 1)  # a slow machine's delay may exceed what is left
        same = apart(chunk[0, :frozen], left[:frozen]) if frozen else None
        asked.append({"delay": delay, "left": count, "frozen": same})
        return chunk

    policy.predict_action_chunk = spy
    engine = RTCInferenceEngine(
        policy, before, after, SimpleNamespace(robot_type="toy", action_features={}), rtc, features, frame.instruction,
        fps=1.0, device="cpu", rtc_queue_threshold=7,
    )  # fmt: skip
    engine.start()
    engine.resume()
    actions, until = [], time.monotonic() + 60
    while len(asked) < 3 and time.monotonic() < until and not engine.failed:
        engine.notify_observation({**dict(zip(names, frame.proprio, strict=True)), **frame.images})
        action = engine.get_action(None)
        if action is not None:
            actions.append(action.tolist())
        time.sleep(0.2)
    engine.stop()
    return {
        "asked": asked[:3],
        "failed": engine.failed,
        "actions": len(actions),
        "finite": bool(np.isfinite(actions).all()),
    }


def main(*folders):
    told = {"version": __version__, "torch": torch.__version__}
    for folder in folders:
        told[Path(folder).name] = compare(folder)
    try:
        configured("--policy.type=lac_vla", f"--policy.path={folders[0]}")
    except ArgumentError as error:
        told["path_and_type"] = str(error)
    print(json.dumps(told))


torch.set_num_threads(1)
main(*sys.argv[1:])
