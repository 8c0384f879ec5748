"""Heads that read keys and values: in training what they are in a session, and a way for their loss to the mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.engine.scenes import frame
from tests.training.test_lac_loss import WARM, gradients
from tests.training.worlds import captured_hidden, losses_of, store_of, tiny

from lac_vla import VLA, CachedVLA, InputError, Random
from lac_vla.models.heads.base import ActionHead, AppendRows, Decoding, HeadContext, LossContext
from lac_vla.models.llama import LlamaDecoder, build_llama
from lac_vla.models.weights import randomise
from lac_vla.training import precision
from lac_vla.training.store import FrameStore
from lac_vla.types import FloatArray, TokenLayout

TEXTS = ("stop", "put the mug on the plate, then stop")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LENGTH = 4


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need float32 products."""
    monkeypatch.setattr(precision, "AUTOCAST", False)


class KVHead(ActionHead):
    """A head that reads keys and values, and whose loss is the square distance from target or teacher."""

    reads = "kv"

    def targets(self, actions: FloatArray) -> npt.NDArray[np.float32]:
        return actions.astype(np.float32)

    def answers(self, context: LossContext) -> torch.Tensor:
        """(B, 7)."""
        raise NotImplementedError

    def loss(
        self,
        context: LossContext,
        targets: torch.Tensor,
        generator: torch.Generator,
        teacher: LossContext | None = None,
    ) -> torch.Tensor:
        if teacher is not None:
            with torch.no_grad():
                targets = self.answers(teacher)
        return (self.answers(context) - targets).square().mean(dim=1)


class LinearHead(KVHead):
    """Linear in the mean over the values of both layers, and over the keys of the last."""

    def __init__(self) -> None:
        self.weight = torch.randn(3 * 16, 7, generator=torch.Generator().manual_seed(1))

    def decode(self, context: HeadContext) -> Decoding:
        read = [context.values(0), context.values(1), context.keys(1)]
        action = torch.cat([part.mean(dim=1).flatten() for part in read]) @ self.weight
        return action.numpy().astype(np.float32), {}
        yield

    def answers(self, context: LossContext) -> torch.Tensor:
        read = [context.values(0), context.values(1), context.keys(1)]
        real = torch.arange(read[0].shape[2]) < context.lengths[:, None]
        means = [(part * real[:, None, :, None]).sum(dim=2) / context.lengths[:, None, None] for part in read]
        return torch.cat([mean.flatten(1) for mean in means], dim=1) @ self.weight.to(means[0].dtype)


class Expert(LlamaDecoder):
    """A stack of another width, whose rows see each other and all of the prompt but its last token."""

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (keys != layout.length - 1).expand(len(queries), -1)


class ExpertHead(KVHead):
    """Runs rows through layers of its own behind the prompt, twice, as an action expert denoises a chunk."""

    max_new_tokens = 3

    def __init__(self) -> None:
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 64}
        self.llama = build_llama({**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0})
        randomise(self.llama.requires_grad_(False), seed=2)
        self.expert = Expert(self.llama)
        generator = torch.Generator().manual_seed(2)
        self.rows, self.readout = torch.randn(3, 24, generator=generator), torch.randn(72, 7, generator=generator)

    def decode(self, context: HeadContext) -> Decoding:
        hidden = yield AppendRows(self.rows, stack=self.expert)
        hidden = yield AppendRows(self.rows + hidden, at=0, stack=self.expert)
        return (hidden.flatten() @ self.readout).numpy().astype(np.float32), {}

    def answers(self, context: LossContext) -> torch.Tensor:
        rows = self.rows.to(context.values(0).dtype).expand(len(context.lengths), -1, -1)
        hidden = context.run(AppendRows(rows, stack=self.expert))
        hidden = context.run(AppendRows(rows + hidden, at=0, stack=self.expert))
        return hidden.flatten(1) @ self.readout.to(hidden.dtype)


HEADS = {"linear": LinearHead, "expert": ExpertHead}


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> KVHead:
    made: KVHead = HEADS[request.param]()
    return made


class PrefixDecoder(LlamaDecoder):
    """Lets the tokens of the prompt see each other, and what is behind it all before it."""

    causal = False

    def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (keys < layout.length) | (keys <= queries[:, None])


def with_decoder(name: str) -> VLA:
    vla = tiny()
    return vla if name == "causal" else replace(vla, decoder=PrefixDecoder(vla.module.language_model))


def seen_store(vla: VLA) -> FrameStore:
    """Two episodes, with prompts of two lengths, of pictures that the model really sees; embeddings unrounded."""
    store = store_of(vla, 2, LENGTH, instructions=TEXTS)
    assert store.suffix_length[0] < store.suffix_length[LENGTH]
    with torch.inference_mode():
        visual = [vla.encode_image(frame(number)).numpy() for number in range(2 * LENGTH)]
    return replace(store, visual=np.stack(visual))


def sessions_of(vla: VLA) -> list:  # type: ignore[type-arg]
    return [CachedVLA(vla, Random(0.6)).session(seed) for seed in range(2)]


def masks(sessions: Sequence) -> torch.Tensor:  # type: ignore[type-arg]
    """What the sessions computed of their last frames, as M."""
    return torch.from_numpy(np.stack([session.last_info.decision.active for session in sessions])).float()


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["causal", "prefix"])
def test_training_answers_as_a_session_does(head: KVHead, decoder: str) -> None:
    """Over several frames of two prompts of different lengths in one batch, on the stale cache, for the same masks."""
    vla = replace(with_decoder(decoder), head=head)
    store = seen_store(vla)
    losses, sessions, old = losses_of(vla, store), sessions_of(vla), None
    for at in range(LENGTH):
        both = zip(sessions, TEXTS, (at, LENGTH + at), strict=True)
        actions = [session.act(frame(number, text)) for session, text, number in both]
        mask = masks(sessions)
        assert (mask.mean() < 0.7) == (at > 0)
        output = losses.decode(np.array([at, LENGTH + at]), mask=mask if at else None, old=old)
        old = output.store.slots
        torch.testing.assert_close(head.answers(output.context()), torch.from_numpy(np.stack(actions)), **CLOSE)
        for part in (slice(0, 1), slice(1, 2)):  # a teacher is a part of a batch
            alone = head.answers(output.context(part))
            torch.testing.assert_close(alone, torch.from_numpy(np.stack(actions[part])), **CLOSE)


@torch.no_grad()
def test_a_prompt_whose_tokens_see_each_other_is_padded_too() -> None:
    """Hidden states of a head of action tokens, forced behind two prompts of different lengths, over several frames."""
    vla = with_decoder("prefix")
    store = seen_store(vla)
    losses, sessions, old, n_rows = losses_of(vla, store), sessions_of(vla), None, vla.head.n_rows
    for at in range(LENGTH):
        expected = []
        for session, text, number in zip(sessions, TEXTS, (at, LENGTH + at), strict=True):
            with captured_hidden(session) as captured:
                session.act(frame(number, text))
            expected.append(captured[0][-n_rows:])
            store.targets[number] = session.last_info.metadata["tokens"]
        output = losses.decode(np.array([at, LENGTH + at]), mask=masks(sessions) if at else None, old=old)
        torch.testing.assert_close(output.hidden, torch.stack(expected), **CLOSE)
        old = output.store.slots


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["causal", "prefix"])
def test_padding_changes_nothing(head: KVHead, decoder: str) -> None:
    """Another content of the padding, more of it, or none: the same answers, loss and teacher of stage I."""
    vla = replace(with_decoder(decoder), head=head)
    store = seen_store(vla)
    short = int(store.suffix_length[0])
    mask = torch.from_numpy(np.random.default_rng(0).random((1, store.layout.n_visual)) < 0.5).float()
    cut = replace(store, suffix=store.suffix[:, :short])
    noise = np.random.default_rng(1).normal(scale=30, size=(len(store), 9, store.suffix.shape[2])).astype(np.float32)
    noisy = replace(store, suffix=np.concatenate([store.suffix, noise], axis=1))
    noisy.suffix[:LENGTH, short:] = 50.0
    found = []
    for each in (cut, store, noisy):
        losses = losses_of(vla, each)
        old = losses.decode(np.array([0])).store.slots
        output = losses.decode(np.array([1]), mask=mask, old=old, probe_layers=(0, 1))
        assert output.attention is not None
        found.append((head.answers(output.context()), output.attention))
    for answer, attention in found[1:]:
        torch.testing.assert_close(answer, found[0][0], **CLOSE)
        torch.testing.assert_close(attention, found[0][1], **CLOSE)


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_loss_moves_both_networks(head: KVHead, loss: str) -> None:
    """λ = 0: all that moves them comes through keys and values."""
    vla = replace(tiny(), head=head)
    losses = losses_of(vla, store_of(vla, instructions=TEXTS), loss)
    losses.window(np.array([0, 8]), 4, WARM, torch.Generator().manual_seed(0), lam=0.0)
    assert min(gradients(losses).values()) > 1e-6


@pytest.mark.parametrize("loss", ["distill", "demo"])
def test_the_gradient_of_the_mask_is_that_of_finite_differences(head: KVHead, loss: str) -> None:
    """∂L/∂M of both prompts of a batch, in float64."""
    vla = replace(tiny(), head=head)
    vla.module.double()
    if isinstance(head, ExpertHead):
        head.llama.double()
    store = store_of(vla, 2, LENGTH, instructions=TEXTS)
    losses, frames = losses_of(vla, store), np.array([1, LENGTH + 1])
    targets = torch.from_numpy(store.targets[frames])
    with torch.no_grad():
        old, teacher = losses.decode(frames - 1).store.slots, losses.decode(frames).context()
    mask = torch.from_numpy(np.random.default_rng(0).random((2, store.layout.n_visual)))

    def value(weights: torch.Tensor) -> torch.Tensor:
        context = losses.decode(frames, mask=weights, old=old).context()
        return head.loss(context, targets, torch.Generator(), teacher if loss == "distill" else None).sum()

    leaf = mask.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf), leaf)
    for row, token in ((0, 0), (0, 20), (1, 7), (1, 51)):
        step = torch.zeros_like(mask)
        step[row, token] = 1e-5
        with torch.no_grad():
            slope = float(value(mask + step) - value(mask - step)) / 2e-5
        assert slope != 0
        assert float(grad[row, token]) == pytest.approx(slope, rel=1e-5, abs=1e-10)


def test_a_loss_cannot_append_behind_what_it_appended(head: KVHead) -> None:
    vla = replace(tiny(), head=head)
    losses = losses_of(vla, store_of(vla, 2, LENGTH))
    context, reader = losses.decode(np.array([0])).context(), tiny()
    rows = torch.zeros(1, 1, 32)
    assert context.run(AppendRows(rows)).shape == rows.shape
    with pytest.raises(InputError, match="appends rows once"):
        context.run(AppendRows(rows, at=1))
    hidden = losses_of(reader, store_of(reader, 2, LENGTH)).decode(np.array([0])).context()
    with pytest.raises(InputError, match="reads keys and values"):
        hidden.run(AppendRows(rows))
