"""Optical flow: that estimators measure motion, and that sessions use the one that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lac_vla import (
    VLA,
    CachedVLA,
    CheckpointError,
    Decision,
    EngineOptions,
    InputError,
    Motion,
    PolicyInput,
    Random,
    random_vla,
)
from lac_vla.cost import CostModel, count_macs
from lac_vla.flow import DISFlow, RAFTFlow, make_flow
from lac_vla.flow.raft import RAFTSmall
from lac_vla.policies import CachePolicy
from tests.engine.scenes import frame


def pictures(size: tuple[int, int], shift: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture, uint8, (H, W, 3), and the same one moved to the right."""
    noise = np.random.default_rng(1).integers(0, 255, (*size, 3), np.uint8)
    picture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    return picture, np.roll(picture, shift, axis=1)


# DIS.


@pytest.mark.parametrize("size", [64, 112, 224])
@pytest.mark.parametrize("flow", [DISFlow(), DISFlow("fast", finest=None), DISFlow("medium")])
def test_dis_follows_a_moving_picture(flow: DISFlow, size: int) -> None:
    found = flow(*pictures((size, size)))
    assert found.shape == (size, size, 2)
    assert found.dtype == np.float32
    inner = found[16:-16, 16:-16]
    assert np.median(inner[..., 0]) == pytest.approx(2, abs=0.3)
    assert np.median(inner[..., 1]) == pytest.approx(0, abs=0.3)


def test_dis_takes_images_smaller_than_its_patches_want() -> None:
    assert np.isfinite(DISFlow()(*pictures((32, 32)))).all()


def test_dis_of_one_size_does_not_depend_on_images_of_another() -> None:
    flow = DISFlow("fast", finest=None)
    before = flow(*pictures((112, 112)))
    flow(*pictures((64, 64)))
    assert (flow(*pictures((112, 112))) == before).all()


# RAFT, with weights of no training: only the wiring can be tested.


def formula_weights() -> dict[str, torch.Tensor]:
    """Weights that do not depend on a generator."""
    weights = {}
    for index, (name, weight) in enumerate(sorted(RAFTSmall().state_dict().items())):
        fan = weight[0].numel() if weight.ndim > 1 else 64
        values = (torch.arange(weight.numel(), dtype=torch.float64) * 0.7 + index).sin() * fan**-0.5
        weights[name] = values.view(weight.shape).float()
    return weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("raft") / "weights.safetensors"
    save_file(formula_weights(), file)
    return file


@torch.inference_mode()
def test_raft_is_torchvisions() -> None:
    """The numbers are those of torchvision 0.28's ``raft_small`` with the same weights."""
    model = RAFTSmall().eval()
    model.load_state_dict(formula_weights())
    images = (torch.arange(2 * 3 * 128 * 136, dtype=torch.float64) * 0.013).sin().float().view(2, 3, 128, 136)
    expected = [
        [[25.5162, 35.4883, 30.5176, 17.6975], [1.6225, 3.9026, 3.6398, 3.1799]],
        [[-15.8984, -13.6565, -14.6752, -1.6800], [0.9163, 1.1044, 0.6305, 1.1894]],
    ]
    torch.testing.assert_close(model(images, 2)[:, ::80, ::45], torch.tensor(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (112, 112), (130, 200)])
def test_raft_gives_every_pixel_a_flow_in_pixels_of_the_image(weights: Path, size: tuple[int, int]) -> None:
    flow = RAFTFlow(weights, iterations=2, device="cpu")
    found = flow(*pictures(size))
    assert found.shape == (*size, 2)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert (flow(*pictures(size)) == found).all()


def test_raft_scales_its_flow_back_with_the_image(weights: Path) -> None:
    """An image enlarged twice by hand is the one that the network sees, and its motion is twice as long."""
    flow = RAFTFlow(weights, iterations=2, device="cpu")
    small = pictures((64, 64))
    large = flow(*(cv2.resize(image, (128, 128)) for image in small))
    np.testing.assert_allclose(flow(*small), cv2.resize(large, (64, 64)) / 2, rtol=1e-4, atol=1e-4)
    wide = pictures((128, 130))  # enlarged to a width of 136
    large = flow(*(cv2.resize(image, (136, 128)) for image in wide))
    expected = cv2.resize(large, (130, 128)) * (130 / 136, 1)
    np.testing.assert_allclose(flow(*wide), expected, rtol=1e-4, atol=1e-4)


def test_raft_reads_safetensors_and_torch_files(weights: Path, tmp_path: Path) -> None:
    torch.save(formula_weights(), tmp_path / "weights.pt")
    one, other = (make_flow(f"raft_small:{file}") for file in (weights, tmp_path / "weights.pt"))
    assert isinstance(one, RAFTFlow)
    assert isinstance(other, RAFTFlow)
    assert one.iterations == 12
    assert (one(*pictures((64, 64))) == other(*pictures((64, 64)))).all()


def test_raft_refuses_what_are_no_weights_of_its_own(weights: Path, tmp_path: Path) -> None:
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("not weights at all")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(Motion(), tmp_path / "object.pt")  # would run code when unpickled
    for name in ("missing.pt", "text.pt", "text.safetensors", "other.pt", "list.pt", "object.pt"):
        with pytest.raises(CheckpointError, match=name):
            make_flow(f"raft_small:{tmp_path / name}")
    with pytest.raises(InputError, match="iterations"):
        RAFTFlow(weights, iterations=0)


def test_what_was_downloaded_once_is_read_by_the_one_safe_reader(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: Path
) -> None:
    def download(url: str, file: str, **_: object) -> None:
        torch.save(formula_weights(), file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    one, other = RAFTFlow(weights, iterations=1), RAFTFlow(iterations=1)
    assert (one(*pictures((64, 64))) == other(*pictures((64, 64)))).all()
    monkeypatch.setattr(torch, "__version__", "2.5.1")  # whose unpickler could be made to run code
    for name in (None, tmp_path / "checkpoints" / "raft_small_C_T_V2-01064c6d.pth"):
        with pytest.raises(CheckpointError, match="torch ≥"):
            RAFTFlow(name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_raft_refuses_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    broken = formula_weights()
    next(iter(broken.values())).view(-1)[0] = value
    save_file(broken, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        RAFTFlow(tmp_path / "w.safetensors")


def test_raft_says_what_to_do_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(CheckpointError, match="raft_small:FILE"):
        make_flow("raft_small")


# What they cost.


def test_raft_costs_what_torch_counts(weights: Path) -> None:
    torch.manual_seed(0)
    flow = RAFTFlow(weights, iterations=5, device="cpu")
    assert torch.initial_seed() == 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))  # nothing was drawn
    for size in ((64, 64), (128, 128), (130, 200)):
        assert flow.macs(*size) == count_macs(partial(flow, *pictures(size)))
    assert RAFTFlow(weights).macs(128, 128) == pytest.approx(2.85e9, rel=0.01)


def test_dis_is_not_counted() -> None:
    assert DISFlow().macs(224, 224) == 0


@pytest.mark.parametrize("async_policy", [False, True])
def test_a_frames_cost_holds_its_flow(model: VLA, weights: Path, async_policy: bool) -> None:
    vla = CachedVLA(model, Spy(f"raft_small:{weights}", []), options=EngineOptions(async_policy=async_policy))
    session, cost = vla.session(), CostModel.of(model, frame(0))
    session.act(frame(0))
    assert session.last_info is not None
    assert cost.step(session.last_info)["flow"] == 0  # nothing precedes the first frame
    session.act(frame(1))
    sizes = [image.shape[:2] for image in session.last_info.pixels.values()]
    flow = make_flow(f"raft_small:{weights}")
    assert flow is not None
    assert cost.step(session.last_info)["flow"] == sum(flow.macs(*size) for size in sizes) > 0
    if not async_policy:  # torch counts what its own thread does
        assert sum(cost.step(session.last_info).values()) == pytest.approx(
            count_macs(lambda: session.act(frame(1))), rel=0.001
        )


# Names.


def test_names() -> None:
    assert make_flow("dis") == DISFlow()
    assert make_flow("dis:medium") == DISFlow("medium")
    assert make_flow("none") is None


@pytest.mark.parametrize("name", ["raft", "", "none:x", "dis:slow", "DIS"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(InputError):
        make_flow(name)
    with pytest.raises(InputError, match="pyramid level"):
        DISFlow(finest=-1)


# What a session does with them.


@dataclass(frozen=True)
class Spy(CachePolicy):
    """Notes what flow it sees."""

    wants: str
    seen: list[int]

    @property
    def flow(self) -> str:
        return self.wants

    def decide(self, inputs: PolicyInput) -> Decision:
        self.seen.append(len(inputs.flow))
        return Decision.dense(inputs.layout.n_visual, inputs.n_layers)


@pytest.fixture(scope="module")
def model() -> VLA:
    return random_vla("tiny")


@pytest.mark.parametrize(
    ("wants", "override", "cameras"),
    [("dis", None, 2), ("dis", "none", 0), ("dis", "dis:medium", 2), ("none", None, 0), ("none", "dis", 0)],
)
def test_the_policys_flow_unless_another_is_asked_for(
    model: VLA, wants: str, override: str | None, cameras: int
) -> None:
    policy = Spy(wants, [])
    vla = CachedVLA(model, policy, flow=override)
    assert (vla.flow_used == "none") == (cameras == 0)
    session = vla.session()
    session.act(frame(0))
    session.act(frame(1))
    assert policy.seen == [cameras]


def test_unknown_flow_of_a_session(model: VLA) -> None:
    for policy, flow in ((Random(), "raft"), (Motion(), "raft"), (Spy("raft", []), None)):
        with pytest.raises(InputError, match="unknown flow 'raft'"):
            CachedVLA(model, policy, flow=flow)


def test_a_policy_may_refuse_a_models_layout(model: VLA) -> None:
    class OneCamera(Random):
        def check_layout(self, grids: object) -> None:
            if grids != {"camera": (2, 2)}:
                raise InputError(f"made for one camera, not for {grids}")

    assert dict(model.grids) == model.processor.prompt(frame(0)).layout.grids
    with pytest.raises(InputError, match=r"made for one camera, not for .*wrist"):
        CachedVLA(model, OneCamera())
