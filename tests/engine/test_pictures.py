"""The vision tower does not look twice at the same picture, and what it saw is taken to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lac_vla import VLA, CachedVLA, Motion, random_vla
from lac_vla.cost import CostModel, count_macs
from lac_vla.engine.frame_memory import tensors
from lac_vla.engine.options import NONE, EngineOptions
from lac_vla.models.prismatic.presets import TINY
from lac_vla.models.prismatic.towers import ViTConfig
from lac_vla.session import plan_together
from lac_vla.types import Frame
from tests.engine.scenes import frame
from tests.engine.test_towers import TOWERS
from tests.gpu.pretend import pretended_gpu, to_pretended_gpu

OWN = ViTConfig(16, 3, 2, 40, patch=8, neck=24, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
TOWER_AND_CONVOLUTION = replace(
    TINY, vision_backbone_id="towers", cameras=(replace(TINY.cameras[0], tower=OWN), TINY.cameras[1])
)
MODELS: dict[str, Any] = {
    **{name: name for name in ("tiny", "pi05-tiny", "smolvla-tiny")},
    "own towers": TOWER_AND_CONVOLUTION,
    "film": TOWERS["film"],
}
ONLY_PICTURES = replace(NONE, picture_reuse=True)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> VLA:
    return random_vla(MODELS[request.param], seed=2)


def shown(number: int, still: str | None = None, instruction: str = "pick up the bowl") -> Frame:
    """A frame, one camera's picture perhaps the first frame's: another array of the same values."""
    now = frame(number, instruction)
    pictures = {name: frame(0).images[name] if name == still else image for name, image in now.images.items()}
    return Frame(pictures, instruction, now.proprio)


def test_a_camera_that_stands_still_is_looked_at_once(model: VLA) -> None:
    names = list(model.grids)
    kept, plain = (CachedVLA(model, Motion(0.3), options=options).session() for options in (ONLY_PICTURES, NONE))
    cost = CostModel.of(model, shown(0))
    for number in range(3):
        observation = shown(number, still=names[-1])
        before = kept.memory.stems.get(names[-1])
        np.testing.assert_allclose(kept.act(observation), plain.act(observation), atol=1e-5)
        assert kept.last_info is not None
        assert plain.last_info is not None
        assert kept.last_info.unchanged == ((names[-1],) if number else ())
        assert plain.last_info.unchanged == ()
        if number:
            assert kept.memory.stems[names[-1]] is before  # to the bit: the very tensors
            alone = count_macs(
                lambda seen=observation: model.vision.encode_stem(
                    seen, {names[-1]: model.processor.images(seen)[names[-1]]}
                )
            )
            saved = cost.step(plain.last_info)["tower"] - cost.step(kept.last_info)["tower"]
            assert saved == alone > 0


def test_of_a_frame_that_is_the_last_one_nothing_is_looked_at(model: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    session, plain = (CachedVLA(model, options=options).session() for options in (ONLY_PICTURES, NONE))
    session.act(shown(0))
    plain.act(shown(0))
    expected = plain.act(shown(0))
    monkeypatch.setattr(type(model.vision), "encode_stem", lambda *_: 1 / 0)
    np.testing.assert_array_equal(session.act(shown(0)), expected)
    np.testing.assert_array_equal(session.shadow(), expected)


def test_what_is_not_the_same_is_looked_at_again(model: VLA) -> None:
    session = CachedVLA(model, options=ONLY_PICTURES).session()
    camera = next(iter(model.grids))
    observation = shown(0)
    session.act(observation)
    observation.images[camera][0, 0, 0] ^= 1  # the robot writes the next picture into the same buffer
    changed = shown(0)
    changed.images[camera][0, 0, 0] ^= 1

    def unchanged(seen: Frame) -> set[str]:
        session.act(seen)
        assert session.last_info is not None
        return set(session.last_info.unchanged)

    assert unchanged(observation) == set(model.grids) - {camera}
    assert unchanged(changed) == set(model.grids)
    assert unchanged(shown(0, instruction="open the drawer")) == {*()}
    assert unchanged(shown(0, instruction="open the drawer")) == set(model.grids)
    stems = sum(part.nbytes for _, stem in session.memory.stems.values() for part in tensors(stem))
    assert session.memory.nbytes == stems + sum(image.nbytes for image in observation.images.values())
    assert session.nbytes > session.memory.nbytes
    session.release()
    assert session.nbytes == 0
    assert unchanged(shown(0, instruction="open the drawer")) == set()
    session.reset()
    assert unchanged(shown(0, instruction="open the drawer")) == set()


def test_a_camera_that_writes_while_the_frame_is_computed(model: VLA, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next picture lands in the same buffer during the call: all of the call, and after, is of the one before."""
    session, plain = (CachedVLA(model, options=options).session() for options in (ONLY_PICTURES, NONE))
    observation, expected = shown(0), plain.act(shown(0))
    images = model.processor.images

    def meanwhile(seen: Frame) -> Any:
        made = images(seen)
        for name, image in observation.images.items():
            image[...] = shown(1).images[name]
        return made

    with monkeypatch.context() as patch:
        patch.setattr(type(model.processor), "images", lambda _, seen: meanwhile(seen))
        np.testing.assert_array_equal(session.act(observation), expected)
    np.testing.assert_array_equal(session.shadow(), expected)
    now = replace(observation, proprio=shown(1).proprio)
    np.testing.assert_allclose(session.act(now), plain.act(shown(1)), atol=1e-5)
    assert session.last_info is not None
    assert session.last_info.unchanged == ()


def test_robots_whose_cameras_stand_still_beside_others() -> None:
    vla = CachedVLA(random_vla("smolvla-tiny"), Motion(0.3))
    packed, alone = [vla.session(seed) for seed in range(3)], [vla.session(seed) for seed in range(3)]
    for number in range(3):
        seen = [shown(number, "wrist"), shown(number), shown(5, "agentview")]
        plans: Any = plan_together(list(zip(packed, seen, strict=True)))
        for own, other, plan, result, observation in zip(
            packed, alone, plans, vla.engine.run(plans), seen, strict=True
        ):
            own.commit(plan, result)
            np.testing.assert_allclose(result.action, other.act(observation), atol=1e-5)
            assert own.last_info.unchanged == other.last_info.unchanged
    assert packed[2].last_info.unchanged == ("agentview", "wrist")
    stem = packed[1].memory.stems["wrist"][1]
    assert stem.untyped_storage().nbytes() == stem.nbytes  # not the whole batch's


def test_beside_graphs_all_cameras_stand_still_or_all_are_looked_at() -> None:
    """One camera's stem alone would have no graph."""
    model = random_vla("smolvla-tiny")
    session, plain = (
        CachedVLA(model, options=EngineOptions.parse(text)).session() for text in ("picture_reuse+cuda_graphs", "none")
    )
    for seen, unchanged in ((shown(0), ()), (shown(1, "wrist"), ()), (shown(1, "wrist"), ("agentview", "wrist"))):
        np.testing.assert_allclose(session.act(seen), plain.act(seen), atol=1e-5)
        assert session.last_info is not None
        assert session.last_info.unchanged == unchanged
        assert session.last_info.eager_runs == 0


def test_on_an_accelerator_a_batch_is_looked_at_in_one_pass() -> None:
    model = random_vla("smolvla-tiny")
    plain = [CachedVLA(model, options=NONE).session(seed) for seed in range(2)]
    seen = [shown(0), shown(1, "wrist")]
    expected = [[session.act(observation) for observation in seen] for session in plain]
    with pretended_gpu():
        vla = CachedVLA(to_pretended_gpu(model), options=ONLY_PICTURES)
        sessions = [vla.session(seed) for seed in range(2)]
        for number, observation in enumerate(seen):
            plans: Any = plan_together([(session, observation) for session in sessions])
            for session, plan, result in zip(sessions, plans, vla.engine.run(plans), strict=True):
                assert session.commit(plan, result).unchanged == ()
                np.testing.assert_allclose(result.action, expected[session.seed][number], atol=1e-3)
        alone = replace(seen[0], images={**seen[0].images, "wrist": seen[1].images["wrist"]})
        sessions[0].act(alone)
    assert sessions[0].last_info is not None
    assert sessions[0].last_info.unchanged == ("wrist",)


def test_a_broken_stem_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_vla("smolvla-tiny")
    session = CachedVLA(model).session()
    encode = type(model.vision).encode_stem
    with monkeypatch.context() as patch:
        patch.setattr(type(model.vision), "encode_stem", lambda *given: encode(*given) * float("nan"))
        with pytest.raises(ArithmeticError):
            session.act(shown(0))
    assert torch.isfinite(torch.from_numpy(session.act(shown(0)))).all()


def test_beside_reuse_of_the_towers_keys_and_values_nothing_is_kept() -> None:
    vla = CachedVLA(random_vla("smolvla-tiny"), Motion(0.5), options=EngineOptions(vision_kv_reuse=True))
    session = vla.session()
    for _ in range(2):
        session.act(shown(0))
    assert session.last_info is not None
    assert session.last_info.unchanged == ()
    assert not session.memory.stems
