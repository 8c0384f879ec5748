"""The invariants of the engine, over every policy and every kind of frame, on a tiny random model in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lac_vla import VLA, CachedVLA, Decision, Dense, Frame, InputError, Random, Session, random_vla
from lac_vla.engine.step_info import StepInfo
from lac_vla.models import FAMILIES
from lac_vla.models.heads.base import Decoding, HeadContext, alone
from lac_vla.models.llama import LlamaDecoder
from lac_vla.models.prismatic.presets import MINI, TINY
from lac_vla.policies import CachePolicy, FastV, SparseVLM, VLACache
from lac_vla.types import AttentionProbe, PolicyInput, SkippedTokens, TokenLayout
from tests.engine.reference import ReferenceDecoder
from tests.engine.scenes import ALL_POLICIES, HESITANT, PRUNING, REUSING, frame

SEQUENCES: dict[str, list[Frame]] = {
    "first frame": [frame(0)],
    "unchanged frame": [frame(0), frame(0), frame(0)],
    "changed frame": [frame(i) for i in range(5)],
    "new instruction": [frame(0), frame(1), frame(2, "put the mug on the plate, then stop"), frame(3, "stop")],
}


MODELS = {
    **{name: family.presets[family.tiny] for name, family in FAMILIES.items()},
    "one camera": replace(TINY, cameras=TINY.cameras[:1]),
}


@pytest.fixture(scope="module", params=MODELS)
def backbone(request: pytest.FixtureRequest) -> VLA:
    return random_vla(MODELS[request.param], seed=3)


def reference(backbone: VLA) -> ReferenceDecoder:
    decoder = backbone.decoder
    sizes = decoder.shape.queries // decoder.head_dim, decoder.kv_heads
    if hasattr(backbone.module, "language_model"):
        weights = dict(backbone.module.language_model.state_dict())  # type: ignore[operator]
        return ReferenceDecoder(weights, *sizes, sees=causal if decoder.causal else everything)
    gemma = backbone.family != "smolvla"
    blocks = backbone.module.prefix if gemma else backbone.module.text
    weights = {f"model.{name}": value for name, value in blocks.state_dict().items()}  # type: ignore[operator]
    if gemma:
        return ReferenceDecoder(
            weights, *sizes, gain=1.0, activate=partial(F.gelu, approximate="tanh"), sees=everything
        )
    return ReferenceDecoder(weights, *sizes, eps=1e-5, sees=all_but_the_last)


def causal(length: int) -> torch.Tensor:
    return everything(length).tril()


def everything(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def all_but_the_last(length: int) -> torch.Tensor:
    """SmolVLA's state stands last and sees itself; nobody else does."""
    sees = everything(length)
    sees[:-1, -1] = False
    return sees


def sequence_of(backbone: VLA, observation: Frame, tokens: list[int]) -> torch.Tensor:
    """Embeddings of the prompt and of the tokens that were fed back into the model, (length, width)."""
    with torch.inference_mode():
        visual = backbone.encode_image(observation)
        prefix, suffix = backbone.processor.embed(backbone.processor.prompt(observation))
        if not tokens:
            return torch.cat([prefix, visual, suffix])
        embed = backbone.module.language_model.get_input_embeddings()
        appended = embed(torch.tensor(tokens[:-1], dtype=torch.long))
        return torch.cat([prefix, visual, suffix, appended])


def run(session: Session, frames: list[Frame]) -> list[object]:
    """What the head says about its actions: token ids, normalised values."""
    infos: list[object] = []
    for observation in frames:
        session.act(observation)
        assert session.last_info is not None
        infos.append(session.last_info.metadata)
    return infos


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_dense_equals_the_stock_model(backbone: VLA, sequence: str) -> None:
    """Transformers' own forward pass, uncached: hidden states and, where there are any, greedy tokens."""
    if backbone.head.reads == "kv":
        assert_stock_values(backbone, SEQUENCES[sequence])
        return
    session = CachedVLA(backbone, Dense()).session()
    for observation in SEQUENCES[sequence]:
        hidden = capture_hidden(session, observation)
        assert session.last_info is not None
        tokens, layout = session.last_info.metadata.get("tokens", []), session.last_info.layout
        embeddings = sequence_of(backbone, observation, tokens)
        with torch.inference_mode():
            length = len(embeddings)
            mask = None if backbone.decoder.causal else torch.zeros(1, 1, length, length)  # or else it is causal
            stock = backbone.module.language_model.model(
                inputs_embeds=embeddings[None], attention_mask=mask, use_cache=False
            )
            logits = backbone.module.language_model.lm_head(stock.last_hidden_state[0, layout.length - 1 :])
        torch.testing.assert_close(hidden, stock.last_hidden_state[0, layout.suffix.start :], rtol=1e-5, atol=1e-5)
        assert logits.argmax(-1).tolist() == tokens or not tokens


def assert_stock_values(backbone: VLA, frames: list[Frame]) -> None:
    """The values of every layer of transformers' own forward pass."""
    if not hasattr(backbone.module, "text"):
        pytest.skip("its blocks are not those of transformers")
    text, session, found = backbone.module.text, CachedVLA(backbone, Dense()).session(), []
    for layer in text.layers:  # type: ignore[union-attr]
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out: found.append(out))  # type: ignore[union-attr]
    for observation in frames:
        session.act(observation)
        found.clear()
        embeddings = sequence_of(backbone, observation, [])
        mask = torch.zeros(len(embeddings), len(embeddings)).masked_fill_(
            ~all_but_the_last(len(embeddings)), -torch.inf
        )
        with torch.inference_mode():
            text(inputs_embeds=embeddings[None], attention_mask=mask[None, None], use_cache=False)  # type: ignore[operator]
        heads = (session.model.decoder.kv_heads, session.model.decoder.head_dim)
        stock = torch.cat(found).unflatten(2, heads).transpose(1, 2)
        torch.testing.assert_close(slots_of(session)[1], stock, rtol=1e-5, atol=1e-5)


def slots_of(session: Session) -> torch.Tensor:
    """Keys and values of the prompt, (2, layers, kv_heads, length, head_dim)."""
    layout, start, store = session.memory.layout, session._region.start, session.engine.store
    assert layout is not None
    own = slice(start, start + layout.length)
    return torch.stack([store.keys[:, :, own], store.values[:, :, own]])


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("name", ALL_POLICIES)
def test_sparse_equals_the_reference(backbone: VLA, name: str, sequence: str) -> None:
    """Invariant 3, and 1 for its first frames: hidden states of the suffix, and every decoding step.

    Of a head that reads keys and values, those of every slot that exists, in every layer.
    """
    session = CachedVLA(backbone, ALL_POLICIES[name]()).session(seed=5)
    expected, frames = reference(backbone), SEQUENCES[sequence]
    sparse = 0
    for observation in frames:
        captured = capture_hidden(session, observation)
        step = session.last_info
        assert step is not None
        embeddings = sequence_of(backbone, observation, step.metadata.get("tokens", []))
        hidden = expected.run(embeddings, step.layout.n_prefix, step.decision)[step.layout.suffix.start :]
        if backbone.head.reads == "hidden":
            torch.testing.assert_close(captured.double(), hidden, rtol=1e-5, atol=1e-5)
        else:
            assert_slots(captured.double(), expected, step)
        sparse += int(step.ratio > 0)
    expected_sparse = sum(one.instruction == other.instruction for one, other in pairwise(frames))
    if name == "dense" or backbone.decoder.causal:
        expected_sparse = 0 if name == "dense" else len(frames) - 1
    assert sparse == expected_sparse or (name in HESITANT and 0 < sparse < expected_sparse)


def assert_slots(found: torch.Tensor, expected: ReferenceDecoder, step: StepInfo) -> None:
    for layer, pair in enumerate(expected.old):
        exist = torch.ones(step.layout.length, dtype=torch.bool)
        if step.decision.skipped is SkippedTokens.PRUNE:
            exist[step.layout.visual] = torch.from_numpy(step.decision.exit_layer > layer)
        torch.testing.assert_close(found[:, layer][:, :, exist], torch.stack(pair)[:, :, exist], rtol=1e-5, atol=1e-5)


def capture_hidden(session: Session, observation: Frame) -> torch.Tensor:
    """Act, and return the hidden states of suffix and appended tokens as they stood in the end.

    If the head reads none: keys and values of the prompt, (2, layers, kv_heads, length, head_dim).
    """
    if session.model.head.reads == "kv":
        session.act(observation)
        return slots_of(session).clone()
    head, rows = session.model.head, torch.zeros(0)
    original = head.decode

    def spy(context: HeadContext) -> Decoding:
        nonlocal rows
        rows, n = context.hidden, context.layout.n_suffix
        decoding = alone(original(context))
        try:
            request = next(decoding)
            while True:
                new = yield request
                rows = torch.cat([rows if request.at is None else rows[: n + request.at], new])
                request = decoding.send(new)
        except StopIteration as answer:
            return answer.value  # type: ignore[no-any-return]

    head.decode = spy  # type: ignore[method-assign]
    try:
        session.act(observation)
    finally:
        del head.decode
    return rows


def bidirectional(vla: VLA) -> VLA:
    """The same model, but every token sees every other."""

    class Both(LlamaDecoder):
        causal = False

        def visible(self, layout: TokenLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(queries), len(keys), dtype=torch.bool)

    return replace(vla, decoder=Both(vla.module.language_model))


def test_watching_every_row_of_every_layer_changes_nothing(backbone: VLA) -> None:
    """The last layer computes the suffix only, unless somebody looks at the other rows."""

    @dataclass(frozen=True)
    class All(Random):
        def probe(self, n_layers: int) -> AttentionProbe:
            return AttentionProbe(tuple(range(n_layers)), "all")

    session, watched = (CachedVLA(backbone, policy).session() for policy in (Random(0.5), All(0.5)))
    for i in range(3):
        torch.testing.assert_close(capture_hidden(watched, frame(i)), capture_hidden(session, frame(i)))
        assert watched.last_info is not None
        layout, rows = watched.last_info.layout, int(watched.last_info.active.sum())
        shape = (layout.n_prefix + rows + layout.n_suffix, layout.length)
        assert {tuple(seen.shape) for seen in watched.memory.attention.values()} == {shape}
        assert all(torch.allclose(seen.sum(dim=1), torch.ones(shape[0])) for seen in watched.memory.attention.values())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_last_row_is_the_last_that_the_head_reads(backbone: VLA, layer: int) -> None:
    """What stands behind it is there to be seen, and nobody asks what it sees."""

    @dataclass(frozen=True)
    class Probed(Random):
        rows: str = "last"

        def probe(self, n_layers: int) -> AttentionProbe:
            return AttentionProbe((layer,), self.rows)

    last, suffix = (CachedVLA(backbone, Probed(0.5, rows=rows)).session() for rows in ("last", "suffix"))
    for i in range(3):
        last.act(frame(i))
        suffix.act(frame(i))
        assert last.last_info is not None
        read = last.last_info.layout.n_suffix - last.last_info.layout.n_unread
        torch.testing.assert_close(last.memory.attention[layer][0], suffix.memory.attention[layer][read - 1])
        assert len(last.memory.attention[layer]) == 1


@pytest.mark.parametrize("name", REUSING)
def test_unchanged_frame_is_exact_under_reuse(backbone: VLA, name: str) -> None:
    """Invariant 2."""
    session = CachedVLA(backbone, ALL_POLICIES[name]()).session()
    dense = CachedVLA(backbone, Dense()).session()
    dense_hidden = capture_hidden(dense, frame(4))
    for _ in range(3):
        torch.testing.assert_close(capture_hidden(session, frame(4)), dense_hidden, rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class ReuseAll(CachePolicy):
    def decide(self, inputs: PolicyInput) -> Decision:
        return Decision.reuse(np.ones(inputs.layout.n_visual, dtype=bool), inputs.n_layers)


@dataclass(frozen=True)
class PruneNothing(CachePolicy):
    def decide(self, inputs: PolicyInput) -> Decision:
        return Decision(np.full(inputs.layout.n_visual, inputs.n_layers), inputs.n_layers, SkippedTokens.PRUNE)


@pytest.mark.parametrize(
    "policy", [PruneNothing(), FastV(ratio=0), SparseVLM(keep="576+576+576")], ids=lambda policy: type(policy).__name__
)
def test_pruning_nothing_is_exact(backbone: VLA, policy: CachePolicy) -> None:
    """Invariant 2 for pruning within the frame."""
    session, dense = CachedVLA(backbone, policy).session(), CachedVLA(backbone, Dense()).session()
    for i in range(3):
        torch.testing.assert_close(capture_hidden(session, frame(i)), capture_hidden(dense, frame(i)))


@pytest.mark.parametrize("name", REUSING)
def test_no_slot_outlives_max_age(backbone: VLA, name: str) -> None:
    """Invariant 6, with a policy's rule against it."""
    session = CachedVLA(backbone, ALL_POLICIES[name](), max_age=3).session()
    ages = np.zeros(0)
    for i in range(12):
        session.act(frame(i % 2))
        assert session.last_info is not None
        ages = session.last_info.age
        assert ages.max() <= 3
    if name != "dense":
        assert ages.max() > 0


def test_a_maximum_age_is_counted_in_control_steps(backbone: VLA) -> None:
    """A maximum age means the same time where several actions of a chunk are executed between two frames."""
    for steps, refreshed in ((1, 8), (4, 2), (8, 1)):
        session = CachedVLA(backbone, ReuseAll(), max_age=8).session()
        session.steps_per_frame = steps
        forced = []
        for _ in range(2 * refreshed + 2):
            session.act(frame(0))
            assert session.last_info is not None
            forced.append(bool(session.last_info.forced.any()))
        session.reset()
        assert session.steps_per_frame == steps
        assert forced == [False] + [i % (refreshed + 1) == refreshed for i in range(2 * refreshed + 1)]


@pytest.mark.parametrize("name", PRUNING)
def test_what_is_pruned_has_no_age(backbone: VLA, name: str) -> None:
    """It is absent, not old: no bound on ages would mean anything for it."""
    session = CachedVLA(backbone, ALL_POLICIES[name](), max_age=3).session()
    for i in range(6):
        session.act(frame(i % 2))
        assert session.last_info is not None
        assert session.last_info.oldest_age == (0 if i == 0 else None)  # the first frame is dense
        assert not session.last_info.age.any()
    assert session.last_info.ratio > 0


def test_protecting_everything_is_exact(backbone: VLA) -> None:
    """VLA-Cache with every token task-relevant recomputes every token, in every layer, on any frame."""
    session = CachedVLA(backbone, VLACache(similarity=0, protect=256)).session()
    dense = CachedVLA(backbone, Dense()).session()
    for i in range(3):
        torch.testing.assert_close(capture_hidden(session, frame(i)), capture_hidden(dense, frame(i)))


def test_forced_tokens_are_the_old_ones(backbone: VLA) -> None:
    session = CachedVLA(backbone, ReuseAll(), max_age=2).session()
    forced = []
    for _ in range(7):
        session.act(frame(0))
        assert session.last_info is not None
        forced.append(int(session.last_info.forced.sum()))
    n = session.last_info.layout.n_visual
    assert forced == [0, 0, 0, n, 0, 0, n]


@pytest.mark.parametrize("name", sorted(set(ALL_POLICIES) - {"dense"}))
def test_reset_makes_the_next_frame_dense_and_the_episode_repeatable(backbone: VLA, name: str) -> None:
    """Invariant 5: reset; and determinism."""
    session = CachedVLA(backbone, ALL_POLICIES[name]()).session(seed=11)
    frames = [frame(i) for i in range(4)]
    first = run(session, frames)
    session.reset()
    session.act(frames[0])
    assert session.last_info is not None
    assert session.last_info.ratio == 0
    assert session.last_info.dense_reason == "first frame"
    session.reset()
    assert run(session, frames) == first


def test_scene_cut_drops_the_cache(backbone: VLA) -> None:
    session = CachedVLA(backbone, Random(0.5)).session()
    session.act(frame(0))
    black = replace(frame(0), images={camera: np.zeros_like(image) for camera, image in frame(0).images.items()})
    session.act(black)
    assert session.last_info is not None
    assert session.last_info.dense_reason == "scene cut"
    assert session.last_info.ratio == 0
    session.act(black)
    assert session.last_info.ratio > 0


def test_new_instruction_drops_the_cache_of_a_bidirectional_model() -> None:
    both = bidirectional(random_vla(TINY))
    session = CachedVLA(both, Random(0.5)).session()
    session.act(frame(0))
    session.act(frame(1))
    assert session.last_info is not None
    assert session.last_info.dense_reason is None
    assert session.last_info.draft == 0  # the prompt itself would see the guess
    session.act(frame(2, "something else"))
    assert session.last_info.dense_reason == "new instruction"


def test_other_image_size_is_refused_until_reset(backbone: VLA) -> None:
    session = CachedVLA(backbone, Random(0.5)).session()
    session.act(frame(0))
    before = session.act(frame(1))
    larger = replace(frame(2), images=dict.fromkeys(("agentview", "wrist"), np.zeros((80, 80, 3), np.uint8)))
    with pytest.raises(InputError, match=r"session\.reset"):
        session.act(larger)
    assert session.last_info is not None
    assert session.last_info.ratio > 0  # the last good step is still there
    session.act(frame(2))
    assert session.last_info.dense_reason is None  # and the cache was not lost
    session.reset()
    session.act(larger)
    assert session.last_info.dense_reason == "first frame"
    assert np.isfinite(before).all()


def test_sessions_share_nothing(backbone: VLA) -> None:
    vla = CachedVLA(backbone, Random(0.5))
    alone = run(vla.session(seed=1), [frame(i) for i in range(5)])
    one, other = vla.session(seed=1), vla.session(seed=2)
    mixed = []
    for i in range(5):
        mixed += run(one, [frame(i)])
        run(other, [frame(100 + i, "do something else")])
    assert mixed == alone


@pytest.mark.parametrize("part", ["vision.encode_tokens", "vision.project", "decoder.norm", "head.decode"])
def test_after_an_exception_the_next_frame_is_dense_and_right(backbone: VLA, part: str) -> None:
    """Invariant 5: a frame that fails half way is never built upon."""
    session = CachedVLA(backbone, Random(0.5)).session()
    session.act(frame(0))

    def fail(*_: object) -> None:
        raise RuntimeError("device lost")

    with pytest.MonkeyPatch.context() as patch:
        part, name = part.split(".")
        patch.setattr(getattr(backbone, part), name, fail)
        with pytest.raises(RuntimeError, match="device lost"):
            session.act(frame(1))
    hidden = capture_hidden(session, frame(2))
    assert session.last_info is not None
    assert session.last_info.dense_reason == "first frame"
    torch.testing.assert_close(hidden, capture_hidden(CachedVLA(backbone, Dense()).session(), frame(2)))


@pytest.mark.parametrize("name", ["camera", "proprio"])
def test_bad_frames_leave_the_session_as_it_was(name: str) -> None:
    backbone = random_vla(replace(TINY, proprio_dim=8, norm_stats=MINI.norm_stats))
    proprio = np.zeros(8, np.float32)
    good = [Frame(frame(i).images, "go", proprio) for i in range(2)]
    bad = {
        "camera": Frame({"agentview": good[0].images["agentview"]}, "go", proprio),
        "proprio": Frame(good[0].images, "go", proprio[:6]),
    }
    session = CachedVLA(backbone, Random(0.5)).session()
    session.act(good[0])
    with pytest.raises(InputError, match="wrist|cameras" if name == "camera" else "8 values"):
        session.act(bad[name])
    session.act(good[1])
    assert session.last_info is not None
    assert session.last_info.dense_reason is None


def test_memory_of_a_session_is_flat(backbone: VLA) -> None:
    session = CachedVLA(backbone, Random(0.5)).session()
    session.act(frame(0, "a much longer instruction than the ones that follow it"))
    size = session.nbytes
    for i in range(30):
        session.act(frame(i))
    assert session.nbytes == size
