"""The rules of the published baselines, on inputs small enough to compute by hand, and against their own release."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lac_vla import InputError, PolicyInput, TokenLayout
from lac_vla.policies import FastV, PolicySpec, SparseVLM, VLACache, build_policy, make_policy
from lac_vla.policies.base import scale_count, scale_layers
from lac_vla.policies.sparse_vlm import rate
from lac_vla.policies.vla_cache import (
    cumulative_schedule,
    damped_schedule,
    exit_layers,
    mean_entropy,
    most_attended,
    patch_similarity,
    static_tokens,
    text_to_visual,
)
from lac_vla.types import AttentionProbe, SkippedTokens

GOLDEN = Path(__file__).parent / "goldens" / "vla_cache_released_golden.npz"
SIDE = 2
"""Side of a patch in the pictures made here, in pixels."""


def picture(rows: int, cols: int, **blue: int) -> np.ndarray:
    """Grey (100, 100, 100) patches; ``p3=20`` makes the blue of patch 3 brighter by 20."""
    image = np.full((rows * SIDE, cols * SIDE, 3), 100, np.uint8)
    for name, value in blue.items():
        row, col = divmod(int(name[1:]), cols)
        image[row * SIDE : (row + 1) * SIDE, col * SIDE : (col + 1) * SIDE, 2] += value
    return image


def policy_input(
    layout: TokenLayout, now: dict[str, np.ndarray], before: dict[str, np.ndarray], attention: dict[int, torch.Tensor]
) -> PolicyInput:
    return PolicyInput(
        layout=layout,
        n_layers=len(attention),
        instruction="go",
        pixels=now,
        previous=before,
        reference={name: np.zeros_like(image) for name, image in now.items()},  # VLA-Cache must not look at it
        flow={},
        age=np.zeros(layout.n_visual, np.int64),
        rng=np.random.default_rng(0),
        attention=attention,
    )


def rows(n: int, keys: int, *seen: int) -> torch.Tensor:
    """Attention of n rows, each shared out evenly to the keys seen: an entropy of ln(number of them)."""
    attention = torch.zeros(n, keys)
    attention[:, list(seen)] = 1 / len(seen)
    return attention


STILL = picture(2, 4)


class TestScaling:
    def test_layers_of_32_are_the_released_ones(self) -> None:
        assert [scale_layers(layer, 32) for layer in (2, 3, 6, 9, 11, 16)] == [2, 3, 6, 9, 11, 16]

    def test_layers_of_4_round_up(self) -> None:
        """2, 6, 9 and 11 of 32 are 0.25, 0.75, 1.125 and 1.375 of 4."""
        assert [scale_layers(layer, 4) for layer in (2, 6, 9, 11)] == [1, 1, 2, 2]

    def test_counts(self) -> None:
        assert scale_count(130, 256, 256) == 130
        assert scale_count(130, 256, 196) == 100  # 99.53
        assert scale_count(120, 256, 16) == 8  # 7.5


class TestFastV:
    LAYOUT = TokenLayout.of({"a": (2, 2), "b": (1, 2)}, 1, 2)

    def test_drops_what_the_last_token_attends_to_least(self) -> None:
        policy = FastV()
        inputs = policy_input(self.LAYOUT, {}, {}, {layer: torch.zeros(0, 0) for layer in range(32)})
        before = policy.decide(inputs)
        assert (before.exit_layer.tolist(), before.skipped) == ([32] * 6, SkippedTokens.PRUNE)
        #                          BOS | visual tokens, of both cameras together | text
        attention = torch.tensor([[0.0, 0.3, 0.02, 0.2, 0.01, 0.03, 0.04, 0.0, 0.4]])
        after = policy.refine(self.LAYOUT, 2, attention, before)
        assert (after.exit_layer.tolist(), after.skipped) == ([32, 3, 32, 3, 3, 32], SkippedTokens.PRUNE)

    def test_ratio_is_the_share_that_goes(self) -> None:
        attention = torch.tensor([[0.0, 0.3, 0.02, 0.2, 0.01, 0.03, 0.04, 0.0, 0.4]])
        inputs = policy_input(self.LAYOUT, {}, {}, {layer: torch.zeros(0, 0) for layer in range(4)})
        policy = FastV(ratio=0.2)  # of 6: 1.2
        assert policy.refine(self.LAYOUT, 0, attention, policy.decide(inputs)).exit_layer.tolist() == [4, 4, 4, 1, 4, 4]

    def test_probes_the_layer_before_the_cut(self) -> None:
        assert FastV().probe(32) == AttentionProbe((2,), "last")
        assert FastV().probe(4) == AttentionProbe((0,), "last")
        assert FastV(layer=16).probe(4) == AttentionProbe((1,), "last")


class TestSparseVLM:
    LAYOUT = TokenLayout.of({"a": (2, 4)}, 1, 3)

    def test_raters_look_at_the_image_more_than_the_average_text_does(self) -> None:
        """Means 0.2, 0.1 and 0.3: above their average of 0.2 is the last row alone."""
        attention = np.array([[0.4, 0.0], [0.2, 0.0], [0.1, 0.5]], np.float32)
        np.testing.assert_allclose(rate(attention), [0.1, 0.5])

    def test_without_raters_everyone_rates(self) -> None:
        np.testing.assert_allclose(rate(np.array([[0.5, 0.0], [0.25, 0.25]], np.float32)), [0.375, 0.125])

    def test_three_stages(self) -> None:
        """Of 8 tokens 300, 200 and 110 of 576 are 4.2, 2.8 and 1.5: 4, 3 and 2."""
        policy = SparseVLM()
        decision = policy.decide(policy_input(self.LAYOUT, {}, {}, {layer: torch.zeros(0, 0) for layer in range(32)}))
        assert decision.skipped is SkippedTokens.PRUNE

        def stage(layer: int, *rating: float) -> list[int]:
            """One rater, whose row is given, and two text tokens that look at the text only."""
            nonlocal decision
            text = [0.0] * len(rating)
            attention = torch.tensor([[0.0, *line, 0.1, 0.1, 0.1] for line in (text, rating, text)])
            decision = policy.refine(self.LAYOUT, layer, attention, decision)
            return decision.exit_layer.tolist()

        assert stage(2, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5) == [3, 32, 3, 32, 3, 32, 3, 32]
        # From here on the keys are those that are left: tokens 1, 3, 5 and 7.
        assert stage(6, 0.9, 0.2, 0.3, 0.4) == [3, 32, 3, 7, 3, 32, 3, 32]
        assert stage(15, 0.1, 0.3, 0.2) == [3, 16, 3, 7, 3, 32, 3, 32]

    def test_ties_keep_the_lower_index(self) -> None:
        """Of 256 equally rated tokens, 300 of 576 are 133.3. Up to 64 equal values any sort of numpy's is stable."""
        policy, layout = SparseVLM(), TokenLayout.of({"a": (16, 16)}, 1, 3)
        decision = policy.decide(policy_input(layout, {}, {}, {layer: torch.zeros(0, 0) for layer in range(32)}))
        after = policy.refine(layout, 2, torch.full((3, 260), 0.1), decision)
        assert after.exit_layer.tolist() == [32] * 133 + [3] * 123

    def test_probes_its_stages(self) -> None:
        assert SparseVLM().probe(32) == AttentionProbe((2, 6, 15), "suffix")

    def test_in_a_shallow_model_the_later_stage_of_a_layer_counts(self) -> None:
        """3 and 7 of 32 layers are 1 of 4, 16 are 2: behind layer 0 are 200 of 576 tokens, behind layer 1 are 110."""
        policy = SparseVLM()
        assert policy.probe(4) == AttentionProbe((0, 1), "suffix")
        decision = policy.decide(policy_input(self.LAYOUT, {}, {}, {layer: torch.zeros(0, 0) for layer in range(4)}))
        after = policy.refine(self.LAYOUT, 0, torch.full((3, 12), 0.1), decision)
        assert after.exit_layer.tolist() == [4, 4, 4, 1, 1, 1, 1, 1]


class TestVLACache:
    LAYOUT = TokenLayout.of({"a": (2, 4)}, 1, 2)

    def test_similarity_is_the_cosine_of_raw_values(self) -> None:
        """(1, 1, 1) against (1, 1, 1.2): 3.2 / (√3 · √3.44)."""
        camera = self.LAYOUT.cameras[0]
        similarity = patch_similarity(picture(2, 4), picture(2, 4, p5=20), camera)
        expected = np.ones(8)
        expected[5] = 3.2 / math.sqrt(3 * 3.44)
        np.testing.assert_allclose(similarity, expected, atol=1e-6)

    def test_brightness_alone_changes_nothing_but_black_does(self) -> None:
        camera = TokenLayout.of({"a": (1, 2)}, 1, 1).cameras[0]
        before = picture(1, 2)
        before[:, SIDE:] = 0
        now = before // 2
        np.testing.assert_allclose(patch_similarity(before, now, camera), [1, 0], atol=1e-6)

    def test_static_tokens_are_the_most_similar_that_reach_the_threshold(self) -> None:
        similarity = np.array([0.99, 0.999, 0.9, 0.9999, 0.999], np.float32)
        assert static_tokens(similarity, 0.99, 9).tolist() == [3, 1, 4, 0]
        assert static_tokens(similarity, 0.99, 2).tolist() == [3, 1]

    def test_text_rows_are_the_last_of_the_frame_that_was(self) -> None:
        """Two of the rows, although the current text has five tokens: there are two keys behind the visual ones."""
        attention = torch.cat([rows(3, 6, 1), rows(1, 6, 2), rows(1, 6, 2, 3)])
        np.testing.assert_allclose(text_to_visual(attention, slice(1, 4)), [0, 0.75, 0.25])

    def test_entropy(self) -> None:
        assert float(mean_entropy(torch.cat([rows(1, 8, 0), rows(1, 8, 0, 1, 2, 3)]))) == pytest.approx(math.log(4) / 2)

    def test_upward_steps_are_damped_from_the_damped_layer_before(self) -> None:
        """Shares 0, ½, 1, 0: 0.55·½, and from there 0.55 of the way to 1."""
        damped = damped_schedule(np.array([4, 3, 2, 4], np.float32), 0.55)
        np.testing.assert_allclose(damped, [0, 0.275, 0.275 + 0.55 * 0.725, 0], atol=1e-6)

    def test_cumulated_falls(self) -> None:
        """Falls of ½, −½, and ½: 0.5, 0, 0.5; a gain of 3 is cut off at 1."""
        entropies = np.array([4, 2, 3, 1.5], np.float32)
        np.testing.assert_allclose(cumulative_schedule(entropies, 1), [0, 0.5, 0, 0.5], atol=1e-6)
        np.testing.assert_allclose(cumulative_schedule(entropies, 3), [0, 1, 0, 1], atol=1e-6)
        np.testing.assert_allclose(cumulative_schedule(np.array([1, 2], np.float32), 1), [0, 0])

    def test_the_set_of_those_that_left_only_grows(self) -> None:
        """Of 10: 2 at layer 2, not even these at 6, 5 at 9, 8 at 11."""
        shares = np.zeros(32, np.float32)
        shares[[2, 3, 6, 9, 11]] = 0.21, 1, 0.1, 0.5, 0.89
        depth = exit_layers(12, np.array([0, 1, 2, 4, 5, 7, 8, 9, 10, 11]), (2, 6, 9, 11), shares, 1)
        assert depth.tolist() == [2, 2, 9, 32, 9, 9, 32, 11, 11, 11, 32, 32]

    def test_at_least_one_leaves_if_there_is_one(self) -> None:
        nothing = np.zeros(4, np.float32)
        assert exit_layers(3, np.array([1, 2]), (1, 2), nothing, 1).tolist() == [4, 1, 4]
        assert exit_layers(3, np.array([1, 2]), (1, 2), nothing, 0).tolist() == [4, 4, 4]
        assert exit_layers(3, np.array([], np.int64), (1, 2), nothing, 1).tolist() == [4, 4, 4]

    def attention(self) -> dict[int, torch.Tensor]:
        """Four layers: entropies ln 4, ln 2, 0, ln 4; at layer 1 the text looks at token 4, all else at token 0."""
        looks = torch.cat([rows(9, 11, 0, 1), rows(2, 11, 0, 5)])
        return {0: rows(11, 11, 0, 1, 2, 3), 1: looks, 2: rows(11, 11, 0), 3: rows(11, 11, 0, 1, 2, 3)}

    def test_released(self) -> None:
        """Token 1 changed too much, token 4 is looked at: six may leave, int(1.65) at layer 1, int(4.04) at 2."""
        now = {"a": picture(2, 4, p1=21, p7=20)}  # cosines 0.9958 and 0.9962
        decision = VLACache(static=256, protect=32).decide(
            policy_input(self.LAYOUT, now, {"a": STILL}, self.attention())
        )
        assert decision.exit_layer.tolist() == [1, 4, 2, 2, 4, 2, 4, 4]
        assert decision.skipped is SkippedTokens.REUSE

    def test_released_with_another_instruction(self) -> None:
        longer = TokenLayout.of({"a": (2, 4)}, 1, 5)
        now = {"a": picture(2, 4, p1=21)}
        decision = VLACache(static=256, protect=32).decide(policy_input(longer, now, {"a": STILL}, self.attention()))
        assert decision.exit_layer.tolist() == [1, 4, 2, 2, 4, 2, 4, 4]

    def test_paper(self) -> None:
        """Entropies ln 4, ln 2, 0, ln 4 fall by ½ and 1: shares 0, 0.45, 1, 0 with a gain of 0.9.

        Mean attention of the text: token 4 has 0.5 / 4, tokens 0 and 7 have half of that; tokens 1 and 7 changed.
        """
        attention = self.attention()
        attention[0], attention[3] = rows(11, 11, 0, 1, 9, 10), rows(11, 11, 0, 8, 9, 10)
        inputs = policy_input(self.LAYOUT, {"a": picture(2, 4, p1=21, p7=21)}, {"a": STILL}, attention)
        some = VLACache("paper", static=256, task=0.6, gain=0.9).decide(inputs)
        assert some.exit_layer.tolist() == [1, 4, 1, 2, 4, 2, 2, 4]  # 0 2 3 5 6: int(2.25) at layer 1
        more = VLACache("paper", static=256, task=0.4, gain=0.9).decide(inputs)
        assert more.exit_layer.tolist() == [4, 4, 1, 2, 4, 2, 2, 4]  # 2 3 5 6: int(1.8) at layer 1
        few = VLACache("paper", task=0.6).decide(inputs)  # 100 of 256 are 3 of 8 static tokens: 0, 2 and 3
        assert few.exit_layer.tolist() == [1, 4, 2, 2, 4, 4, 4, 4]  # int(1.5) at layer 1

    @pytest.mark.parametrize("cameras", [1, 2])
    def test_the_released_numbers_at_the_released_size(self, cameras: int) -> None:
        """Nothing moves; the text looks at the first tokens of the first camera, from the 11th on at the second's.

        Entropies ln N, 0, 0, …: shares 0, 0.55, 0.7975, …, 1 − 0.45^l. One camera: 130 − 120 = 10 reusable tokens, of
        which 7 leave at layer 2 and 9 by layer 6. Two: 2 · (150 − 100), of which 79 and 99.
        """
        names = ["primary", "wrist"][:cameras]
        n_protected = {1: 120, 2: 100}[cameras]
        layout = TokenLayout.of({name: (16, 16) for name in names}, 1, n_protected * cameras)
        still = {name: picture(16, 16) for name in names}
        looks = torch.zeros(layout.n_suffix, layout.length)
        for row in range(layout.n_suffix):
            camera, token = divmod(row, n_protected)
            looks[row, 1 + 266 * camera + token] = 1
        attention = {layer: looks for layer in range(32)}
        attention[0] = rows(layout.n_suffix, layout.length, *range(layout.length))
        depth = VLACache(rows="suffix").decide(policy_input(layout, still, still, attention)).exit_layer
        reusable = [*range(120, 130)] if cameras == 1 else [*range(100, 150), *range(256, 266), *range(366, 406)]
        first, second = (7, 9) if cameras == 1 else (79, 99)
        expected = np.full(256 * cameras, 32)
        expected[reusable[:first]] = 2
        expected[reusable[first:second]] = 6
        assert depth.tolist() == expected.tolist()

    def test_probes_every_layer(self) -> None:
        assert VLACache().probe(4) == AttentionProbe((0, 1, 2, 3), "all")
        assert VLACache(rows="suffix").probe(2) == AttentionProbe((0, 1), "suffix")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def attention() -> dict[int, torch.Tensor]:
    """Head means of the attention that the golden outputs were computed from."""
    n, maps = 1 + 256 + 30, {}
    for layer in range(32):
        chance = torch.Generator().manual_seed(1000 + layer)
        scores = torch.randn(1, 2, n, n, generator=chance) * (0.2 + 0.1 * ((7 * layer) % 11))
        maps[layer] = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)[0].mean(0)
    return maps


class TestAgainstTheRelease:
    """Outputs of the released code for OpenVLA; see ``tests/goldens/README.md``."""

    LAYOUT = TokenLayout.of({"camera": (16, 16)}, 1, 30)

    def test_static(self, golden: dict[str, np.ndarray]) -> None:
        similarity = patch_similarity(golden["previous"], golden["current"], self.LAYOUT.cameras[0])
        np.testing.assert_allclose(similarity, golden["similarity"], atol=1e-6)
        assert set(static_tokens(similarity, 0.996, 130)) == set(golden["static"])
        assert static_tokens(golden["similarity"], 0.996, 130).tolist() == golden["static"].tolist()

    def test_task_relevant(self, golden: dict[str, np.ndarray], attention: dict[int, torch.Tensor]) -> None:
        relevance = text_to_visual(attention[15], self.LAYOUT.visual).numpy()
        np.testing.assert_allclose(relevance, golden["text_to_vision"], rtol=1e-5)
        assert most_attended(relevance, 120).tolist() == golden["protected"].tolist()

    def test_schedule(self, golden: dict[str, np.ndarray], attention: dict[int, torch.Tensor]) -> None:
        entropies = torch.stack([mean_entropy(attention[layer]) for layer in range(32)]).numpy()
        np.testing.assert_allclose(damped_schedule(entropies, 0.55), golden["schedule"], atol=1e-5)

    def test_decision(self, golden: dict[str, np.ndarray], attention: dict[int, torch.Tensor]) -> None:
        """The released positions count BOS; a token's depth is the first of the four layers whose share reaches it."""
        decision = VLACache().decide(
            policy_input(self.LAYOUT, {"camera": golden["current"]}, {"camera": golden["previous"]}, attention)
        )
        order = (golden["reusable"] - 1).tolist()
        expected = [32] * 256
        for rank, token in enumerate(order):
            for layer in (11, 9, 6, 2):
                if rank < max(1, int(golden["schedule"][layer] * len(order))):
                    expected[token] = layer
        assert decision.exit_layer.tolist() == expected
        assert set(np.flatnonzero(decision.exit_layer < 32)) <= set(order)
        assert len(set(expected)) > 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vla-cache:variant=fast", "choose 'released' or 'paper'"),
        ("vla-cache:rows=last", "choose 'all' or 'suffix'"),
        ("vla-cache:similarity=1.1", r"similarity is 1\.1; give a number in 0\.\.1"),
        ("vla-cache:task=-1", "task is"),
        ("vla-cache:growth=2", "growth is"),
        ("vla-cache:growth=nan", "growth is"),
        ("vla-cache:gain=-1", "gain is"),
        ("vla-cache:static=300", r"static is 300\.0; give a number of tokens per 256"),
        ("vla-cache:protect=-1", "protect is"),
        ("vla-cache:k=100", "has no option 'k'; its options are variant"),
        ("fastv:ratio=1.5", r"in 0\.\.1; got 1\.5"),
        ("fastv:ratio=-0.1", r"in 0\.\.1; got"),
        ("fastv:layer=0", r"1\.\.31; got 0\.0"),
        ("fastv:layer=2.5", r"1\.\.31; got 2\.5"),
        ("fastv:layer=32", r"1\.\.31; got 32"),
        ("sparsevlm:keep=300", "three falling numbers"),
        ("sparsevlm:keep=110+200+300", "three falling numbers"),
        ("sparsevlm:keep=600+200+110", "three falling numbers"),
        ("sparsevlm:keep=300+200+many", "three falling numbers"),
        ("sparsevlm:keep=300+200+-1", "three falling numbers"),
        ("sparsevlm:keep=300+200+110+66", "three falling numbers"),
    ],
)
def test_bad_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_policy(PolicySpec.parse(text))


def test_options_from_text() -> None:
    assert build_policy(PolicySpec.parse("vla-cache")) == VLACache(variant="released") == make_policy("vla-cache")
    assert build_policy(PolicySpec.parse("vla-cache:variant=paper,static=80,rows=suffix")) == VLACache(
        "paper", static=80, rows="suffix"
    )
    assert build_policy(PolicySpec.parse("fastv:ratio=0.7,layer=2")) == FastV(0.7, 2)
    assert build_policy(PolicySpec.parse("sparsevlm:keep=66+30+17")) == SparseVLM("66+30+17")
