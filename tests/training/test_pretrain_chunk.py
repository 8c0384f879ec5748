"""The training of a small OpenVLA-OFT, on a tiny one: the rows that a session reads, starts from other heads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.test_pretrain import config, dataset, resumes_exactly, tiny, trained_at_first  # noqa: F401
from tests.training.worlds import captured_hidden
from torch.nn.utils.rnn import pad_sequence

from lac_vla import CachedVLA, CheckpointError, Frame, load_vla, random_vla, save_vla
from lac_vla.bundled import MINI, MINI_FLOW, MINI_VIT
from lac_vla.dataset_keys import DatasetKeys
from lac_vla.models.cogact.config import TINY_COGACT
from lac_vla.models.heads.chunk import ChunkHead
from lac_vla.models.oft.config import PRESETS as OFT_PRESETS
from lac_vla.models.oft.config import OFTConfig
from lac_vla.models.prismatic.presets import MINI as MINI_CONFIG
from lac_vla.models.prismatic.presets import PRESETS, TINY
from lac_vla.models.tokenizer import FileTokenizer, train_tokenizer
from lac_vla.training.config import PretrainConfig
from lac_vla.training.pretrain import Pretraining, pretrain
from lac_vla.training.pretrain_losses.base import Batch, Targets
from lac_vla.training.pretrain_losses.chunk import ChunkLoss
from lac_vla.training.pretrain_losses.diffusion import DiffusionLoss
from lac_vla.training.pretrain_losses.tokens import TokenLoss
from lac_vla.training.recipes import RECIPES

TEXTS = ("pick up the bowl", "place the cup on it, beside the bowl")


@pytest.fixture
def chunk(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:  # noqa: F811
    """A chunk of 3 actions on the trunk of a short run with action tokens."""
    start = pretrain(replace(config, out=config.out.with_name("trunk"), coarse_samples=8, fine_samples=8))
    monkeypatch.setitem(OFT_PRESETS, "mini-oft", OFTConfig(PRESETS["mini"], 7, 3))
    monkeypatch.setitem(RECIPES, "mini-oft", replace(RECIPES["mini-oft"], start=start))
    return replace(config, out=config.out.with_name("chunk"), model="mini-oft", chunk=4)


def batch_of(loss: ChunkLoss, frames: list[Frame]) -> Batch:
    """Frames as training takes them, without augmentation."""
    images = {
        name: torch.stack([torch.from_numpy(f.images[name]).permute(2, 0, 1).float() / 127.5 - 1 for f in frames])
        for name in loss.vla.grids
    }
    ids = [torch.tensor(loss.text_ids(frame.instruction)) for frame in frames]
    state = [torch.from_numpy(loss.vla.processor.normalize_state(frame.proprio)) for frame in frames]  # type: ignore[attr-defined]
    count = len(frames)
    targets = Targets(torch.zeros(count, 8, 7), torch.zeros(count, 3, 3), torch.ones(count, 3))
    return Batch(
        images,
        {name: torch.zeros(count, 2, dtype=torch.int64) for name in images},
        torch.stack(state),
        pad_sequence(ids, batch_first=True),
        torch.tensor([len(each) for each in ids]),
        targets,
    )


@torch.no_grad()
def test_the_loss_reads_what_a_session_reads(chunk: PretrainConfig) -> None:
    """Of frames with instructions of different lengths, one of them padded, which all others must not see."""
    loss = Pretraining(chunk).loss.eval()
    assert isinstance(loss, ChunkLoss)
    assert isinstance(loss.head, ChunkHead)
    loss.model.language_model.get_input_embeddings().weight[0] = 1.0  # no token's, also not a placeholder's
    rng = np.random.default_rng(0)
    sides = {camera.name: camera.image_size for camera in loss.model.config.cameras}
    frames = [
        Frame(
            {name: rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for name, side in sides.items()},
            text,
            rng.normal(size=8).astype(np.float32),
        )
        for text in TEXTS
    ]
    batch = batch_of(loss, frames)
    assert batch.text_length[0] != batch.text_length[1]
    generator = torch.Generator()
    read = loss.read(batch, None, loss.append(batch, None, generator))
    losses = []
    for index, frame in enumerate(frames):
        session = CachedVLA(loss.vla).session()
        with captured_hidden(session) as captured:
            session.act(frame)
        expected = loss.head.rows(captured[0])
        torch.testing.assert_close(read[index, : loss.head.n_rows], expected, rtol=1e-4, atol=1e-5)
        losses.append(loss.head.model(expected).abs())
    found = loss.losses(read, batch.targets, None, generator)
    torch.testing.assert_close(found["l1"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["first"], torch.stack(losses)[:, 0].mean(), rtol=1e-4, atol=1e-6)


def test_the_trained_model_acts(chunk: PretrainConfig) -> None:
    vla = load_vla(pretrain(chunk))
    assert (vla.family, vla.horizon, vla.config.vlm.norm_stats.keys()) == ("oft", 3, {"libero"})
    frame = Frame({c: np.zeros((256, 256, 3), np.uint8) for c in vla.grids}, TEXTS[0], np.zeros(8, np.float32))
    assert CachedVLA(vla).session().act(frame).shape == (3, 7)
    lines = [json.loads(line) for line in (chunk.out / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_l1", "held_out_first", "held_out_hindsight"} <= set(lines[-1])


def test_a_run_resumes_exactly(chunk: PretrainConfig) -> None:
    resumes_exactly(chunk, 3)


def test_what_is_loaded_is_held_fixed_at_first(chunk: PretrainConfig) -> None:
    """The head alone learns; also one that was loaded."""
    for number, start in enumerate((None, pretrain(chunk))):
        out = chunk.out.with_name(f"frozen-{number}")
        fixed = replace(chunk, out=out, start=start, frozen_samples=16, frozen_frames=16, coarse_samples=0)
        assert trained_at_first(fixed) == {"action_head"}


def saved(shape: Any, folder: Path) -> Path:
    """A checkpoint of random weights."""
    encode = FileTokenizer(train_tokenizer(list(TEXTS), 259))
    save_vla(replace(random_vla(shape, seed=5), encode=encode), folder)
    return folder


SETTINGS = PretrainConfig(Path("-"), Path("-"), chunk=4)
ABOVE = replace(TINY, cameras=(replace(TINY.cameras[0], name="above"),))
TURNED = replace(TINY, cameras=TINY.cameras[::-1])
WITH_STATE = replace(TINY, proprio_dim=8, norm_stats=MINI_CONFIG.norm_stats)
TINY_CHUNKS, TINY_DRAWS = OFTConfig(TINY, 7, 3), replace(TINY_COGACT, vlm=TINY)


@pytest.mark.parametrize(
    ("make", "ours", "theirs", "new"),
    [
        (ChunkLoss, OFTConfig(ABOVE, 7, 3), TINY, {"action_head"}),
        (ChunkLoss, OFTConfig(ABOVE, 7, 3), TINY_DRAWS, {"action_head"}),
        (ChunkLoss, OFTConfig(ABOVE, 7, 3), replace(TINY_CHUNKS, head="diffusion"), set()),
        (ChunkLoss, OFTConfig(TURNED, 7, 3), TINY_CHUNKS, set()),
        (DiffusionLoss, TINY_DRAWS, TINY_CHUNKS, {"action_model"}),
        (DiffusionLoss, replace(TINY_DRAWS, vlm=ABOVE), replace(TINY_DRAWS, vlm=WITH_STATE), set()),
        (TokenLoss, TURNED, TINY_DRAWS, set()),
        (TokenLoss, ABOVE, TURNED, set()),
    ],
)
def test_a_trunk_starts_from_one_with_another_head_or_other_inputs(
    make: Any, ours: Any, theirs: Any, new: set[str], tmp_path: Path
) -> None:
    """A camera's tower is that of its name; our first one's, if there is none, the start's first one's."""
    loss = make(random_vla(ours, seed=1), SETTINGS)
    before = {name: weight.clone() for name, weight in loss.model.state_dict().items()}
    loss.take_weights(saved(theirs, tmp_path))
    start = load_vla(tmp_path).module.state_dict()
    first = next(iter(load_vla(tmp_path).grids))
    for name, weight in loss.model.state_dict().items():
        if name.partition(".")[0] in new:
            assert torch.equal(weight, before[name]), name
        else:
            assert torch.equal(weight, start[name.replace("towers.above", f"towers.{first}")]), name


@pytest.mark.parametrize(("start", "said"), [(MINI_VIT, "does not fit|another model"), (MINI_FLOW, "no camera's")])
def test_a_start_with_another_tower_is_refused(start: Path, said: str) -> None:
    loss = ChunkLoss(random_vla("mini-oft"), SETTINGS)
    with pytest.raises(CheckpointError, match=said) as refused:
        loss.take_weights(start)
    assert f"{start}" in str(refused.value)
    assert "give another --start" in str(refused.value)


def test_a_model_with_one_camera_and_no_state_is_trained(
    chunk: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = PRESETS["mini"]
    one = OFTConfig(replace(vlm, cameras=(replace(vlm.cameras[0], name="above"),), proprio_dim=None), 7, 2)
    monkeypatch.setitem(OFT_PRESETS, "mini-widowx", one)
    keys = DatasetKeys(camera=("above=observation.images.agentview",))
    start = RECIPES["mini-oft"].start
    vla = load_vla(
        pretrain(replace(chunk, model="mini-widowx", out=chunk.out.with_name("one"), start=start, keys=keys))
    )
    assert set(vla.config.vlm.norm_stats) == {"bridge_orig"}
    answer = CachedVLA(vla).session().act(Frame({"above": np.zeros((480, 640, 3), np.uint8)}, TEXTS[0]))
    assert answer.shape == (2, 7)


@pytest.mark.parametrize(("preset", "tokens"), [("mini-oft", 212), ("mini-widowx", 196)])
def test_the_presets_begin_as_the_bundled_model(preset: str, tokens: int) -> None:
    """All but the head, which reads the rows, is loaded."""
    loss = ChunkLoss(random_vla(preset), PretrainConfig(Path("-"), Path("-")))
    assert loss.layout.n_visual == tokens
    taken = {id(weight) for weight in loss.take_weights(MINI)}
    new = {name.partition(".")[0] for name, weight in loss.model.named_parameters() if id(weight) not in taken}
    assert new == {"action_head"}
