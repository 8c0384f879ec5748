"""Many frames of many robots on one engine, from two threads, all policies and families, against the references."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, Frame, Session, random_vla
from lac_vla.engine.engine import Engine
from lac_vla.engine.options import EngineOptions
from lac_vla.models import FAMILIES
from lac_vla.models.heads.base import Decoding, HeadContext, alone
from tests.engine.reference import ReferenceTower
from tests.engine.scenes import ALL_POLICIES, frame
from tests.engine.test_invariants import assert_slots, reference, slots_of
from tests.engine.test_towers import DINO, SIGLIP, small

FEW, MANY, PARTS = 10_000, 100_000, 20
"""Frames of all models together; parts of the many, each with weights and robots of its own: of a run that is broken
off, the parts that passed count."""
PICTURES, THREADS, RESET, BROKEN = 12, 2, 0.03, 0.01
"""Pictures that robots see; threads; the chance of a new episode, and of a cache that is given up."""
TEXTS = ("pick up the bowl", "stop", "put the mug on the plate, then stop")
MODELS: dict[str, tuple[Any, str]] = {
    **{name: (family.presets[family.tiny], "default") for name, family in FAMILIES.items()},
    "tower reuse": (small((DINO, SIGLIP), 56), "default+vision_kv_reuse"),
}


class Robot:
    """A session, the references that live through the same frames, and what it sees."""

    def __init__(self, engine: Engine, policy: str, number: int, part: int) -> None:
        chosen, model = ALL_POLICIES[policy](), engine.model
        self.name, self.engine, self.rng = policy, engine, np.random.default_rng([part, number, len(policy)])
        self.session = Session(engine, chosen, chosen.flow, 5, 0.25, number)
        self.decoder = reference(model)
        self.towers: list[list[ReferenceTower]] = []
        if engine.options.vision_kv_reuse:
            vits = model.module.vision_backbone.vits  # type: ignore[union-attr]
            self.towers = [
                [
                    ReferenceTower(
                        dict(vit.state_dict()),
                        vit.blocks[0].attn.heads,
                        len(vit.blocks),
                        sum(len(token[0]) for token in (vit.cls_token, vit.reg_token) if token is not None),
                    )
                    for vit in vits
                ]
                for _ in model.grids
            ]
        self.text, self.picture = TEXTS[number % 3], 0

    def look(self) -> Frame:
        if self.rng.random() < 0.1:
            self.text = TEXTS[self.rng.integers(len(TEXTS))]
        self.picture = int(self.rng.integers(PICTURES))
        return frame(self.picture, self.text, tuple(self.engine.model.grids))

    def check(self, observation: Frame, hidden: dict[int, torch.Tensor], pictures: dict[int, torch.Tensor]) -> None:
        """Compare the frame that was committed last with the references."""
        info, model = self.session.last_info, self.engine.model
        assert info is not None
        tokens: list[int] = info.metadata.get("tokens", [])
        visual = self.see(observation, info.encoded) if self.towers else pictures[self.picture]
        prefix, suffix = model.processor.embed(model.processor.prompt(observation))
        parts = [prefix.double(), visual.double(), suffix.double()]
        if tokens:
            embed = model.module.language_model.get_input_embeddings()  # type: ignore[operator, union-attr]
            parts.append(embed(torch.tensor(tokens[:-1], dtype=torch.long)).double())
        expected = self.decoder.run(torch.cat(parts), info.layout.n_prefix, info.decision)
        with self.engine._lock:
            found = slots_of(self.session).double()
        cut = replace_old(self.decoder.old, info.layout.length)
        self.decoder.old, whole = cut, self.decoder.old
        assert_slots(found, self.decoder, info)
        self.decoder.old = whole
        if model.head.reads == "hidden":
            rows = hidden.pop(id(observation)).double()
            torch.testing.assert_close(rows, expected[info.layout.suffix.start :], rtol=1e-5, atol=1e-5)

    def see(self, observation: Frame, encoded: np.ndarray[Any, Any] | None) -> torch.Tensor:
        """Visual embeddings of what the towers computed; of the rest, anything."""
        model = self.engine.model
        stem = model.vision.encode_stem(observation, model.processor.images(observation), model.vision.kv_cache())
        sizes = [rows * cols for rows, cols in model.grids.values()]
        masks = torch.ones(sum(sizes), dtype=torch.bool) if encoded is None else torch.from_numpy(np.array(encoded))
        features = []
        for camera, mask in enumerate(torch.split(masks, sizes)):
            features.append(
                torch.cat([t.run(part[camera], mask) for t, part in zip(self.towers[camera], stem, strict=True)], -1)
            )
        return model.vision.project(torch.cat(features))


def replace_old(old: list[tuple[torch.Tensor, torch.Tensor]], length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Leave out the tokens that were appended behind the prompt: they have no slots of their own."""
    return [(keys[:, :length], values[:, :length]) for keys, values in old]


@contextmanager
def watched(model: VLA) -> Iterator[dict[int, torch.Tensor]]:
    """Hidden states of suffix and appended tokens as they stood in the end, by the frame's identity."""
    head, rows = model.head, {}
    original = head.decode

    def spy(context: HeadContext) -> Decoding:
        decoding, sent = alone(original(context)), None
        seen = context.hidden
        while True:
            try:
                request = decoding.send(sent)
            except StopIteration as answer:
                rows[id(context.frame)] = seen.clone()
                return answer.value  # type: ignore[no-any-return]
            sent = yield request
            seen = torch.cat([seen if request.at is None else seen[: context.layout.n_suffix + request.at], sent])

    with pytest.MonkeyPatch.context() as patch:
        if head.reads == "hidden":
            patch.setattr(head, "decode", spy)
        yield rows


@torch.inference_mode()
def drive(robots: list[Robot], hidden: dict[int, Any], pictures: dict[int, torch.Tensor], frames: int) -> int:
    """Let robots act, some of them at a time, until so many frames were checked."""
    engine, rng, done = robots[0].engine, robots[0].rng, 0
    while done < frames:
        there = [robot for robot in robots if rng.random() < 0.8]
        for robot in there:
            if rng.random() < RESET:
                robot.session.reset()
            if rng.random() < BROKEN:
                robot.session.memory.begin()  # as an error in mid-frame leaves it
        seen = [robot.look() for robot in there]
        plans = [robot.session.plan(observation) for robot, observation in zip(there, seen, strict=True)]
        results = engine.run(plans)
        for robot, plan, result in zip(there, plans, results, strict=True):
            robot.session.commit(plan, result)
            robot.check(plan.frame, hidden, pictures)
            done += 1
    return done


def drive_all(name: str, frames: int, part: int = 0) -> None:
    config, options = MODELS[name]
    model = random_vla(config, seed=3 + part)
    if "vision_kv_reuse" in options:
        model.module.double()  # random towers can make a token of almost nothing, and the norms blow up its rounding
    engine = Engine(model, EngineOptions.parse(options))
    with torch.inference_mode():
        scenes = {number: frame(number, TEXTS[0], tuple(model.grids)) for number in range(PICTURES)}
        pictures = {} if engine.options.vision_kv_reuse else {n: model.encode_image(f) for n, f in scenes.items()}
    robots = [Robot(engine, policy, number, part) for number, policy in enumerate(ALL_POLICIES)]
    with watched(model) as hidden, ThreadPoolExecutor(THREADS) as threads:
        each = [robots[number::THREADS] for number in range(THREADS)]
        runs = [threads.submit(drive, some, hidden, pictures, -(-frames // THREADS)) for some in each]
        assert sum(run.result() for run in runs) >= frames


@pytest.mark.parametrize("name", MODELS)
def test_many_frames(name: str) -> None:
    drive_all(name, FEW // len(MODELS))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_very_many_frames(name: str, part: int) -> None:
    drive_all(name, -(-MANY // len(MODELS) // PARTS), part)
