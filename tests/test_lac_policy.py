"""The learned policy by itself: what it decides, its bounds, and its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lac_vla import (
    CachedVLA,
    CheckpointError,
    InputError,
    LACConfig,
    LACPolicy,
    PolicyInput,
    TokenLayout,
    cli,
    load_vla,
    make_policy,
    random_vla,
)
from lac_vla.bundled import MINI, MINI_COGACT
from lac_vla.cost import count_macs
from lac_vla.models.prismatic.presets import TINY
from lac_vla.policies.lac import Predictor, Selector
from lac_vla.policies.lac.inputs import compose, flow_in_patches, from_policy_inputs, resize, words
from lac_vla.policies.lac.joint import Joint
from tests.engine.scenes import frame

GRIDS = {"agentview": (6, 6), "wrist": (4, 4)}
SIZES = {"agentview": 48, "wrist": 64}


def policy_input(seed: int = 0, instruction: str = "pick up the bowl", age: int = 3) -> PolicyInput:
    rng = np.random.default_rng(seed)

    def images() -> dict[str, np.ndarray]:
        return {name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for name, size in SIZES.items()}

    return PolicyInput(
        layout=TokenLayout.of(GRIDS, 1, 5),
        n_layers=2,
        instruction=instruction,
        pixels=images(),
        previous=images(),
        reference=images(),
        flow={name: rng.normal(size=(size, size, 2)).astype(np.float32) for name, size in SIZES.items()},
        age=np.full(52, age),
        rng=np.random.default_rng(7),
    )


def random_policy(seed: int = 0, *, fixed: float | None = None, **options: object) -> LACPolicy:
    torch.manual_seed(seed)
    policy = LACPolicy(LACConfig(grids=GRIDS, **{"width": 16, **options}), ratio=fixed)  # type: ignore[arg-type]
    torch.nn.init.normal_(policy.predictor.head.weight)
    return policy


def test_the_default_size_is_small() -> None:
    for options in ({}, {"language": True}, {"inputs": "paper"}):
        config = LACConfig(grids={"agentview": (16, 16), "wrist": (16, 16)}, **options)  # type: ignore[arg-type]
        assert sum(weight.numel() for weight in LACPolicy(config).networks.parameters()) <= 300_000


@pytest.mark.parametrize("fixed", [None, 0.5])
@pytest.mark.parametrize("language", [False, True])
def test_its_own_cost_is_counted(fixed: float | None, language: bool) -> None:
    policy = random_policy(fixed=fixed, language=language)
    assert policy.macs == count_macs(lambda: policy.decide(policy_input()))


def test_proprioception_decides_about_the_ratio_alone(tmp_path: Path) -> None:
    policy = random_policy(proprio=3)
    with torch.no_grad():
        torch.nn.init.normal_(policy.predictor.hidden.weight[:, -3:], std=1.0)
    policy.predictor.standardise(torch.randn(40, 3))
    states = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    given = [replace(policy_input(), proprio=state) for state in states]
    alone, together = [policy.decide(each) for each in given], policy.decide_together(given)
    assert len({decision.nominal_ratio for decision in alone}) > 1
    shown = from_policy_inputs(policy.config, given)
    with torch.no_grad():
        logits = policy.predictor(shown, None, torch.from_numpy(states))
    for one, other, own in zip(alone, together, logits, strict=True):
        assert one.nominal_ratio == other.nominal_ratio == policy.config.ratios[int(own.argmax())]
    assert policy.macs == count_macs(lambda: policy.decide(given[0]))
    policy.save_pretrained(tmp_path)
    read = LACPolicy.from_pretrained(tmp_path)
    assert [read.decide(each).nominal_ratio for each in given] == [decision.nominal_ratio for decision in alone]
    with pytest.raises(InputError, match="reads 3 values of proprioception, the frame has none"):
        policy.decide(policy_input())
    with pytest.raises(InputError, match="reads 3 values of proprioception, the frame has 2"):
        policy.decide(replace(policy_input(), proprio=states[0, :2]))
    with pytest.raises(InputError, match=r"reads 3 values of proprioception, the model none.*without --proprio"):
        CachedVLA(random_vla("tiny"), policy)
    policy.ratio = 0.5  # the predictor, which alone reads it, is left out
    assert policy.decide(policy_input()).nominal_ratio == 0.5
    assert policy.check_state(None) is None


def test_paper_inputs_are_five_channels() -> None:
    shown = from_policy_inputs(LACConfig(grids=GRIDS, inputs="paper"), [policy_input()])
    assert [tuple(part.shape) for part in shown] == [(1, 5, 24, 24), (1, 5, 16, 16)]
    assert [part.shape[1] for part in from_policy_inputs(LACConfig(grids=GRIDS, flow="none"), [policy_input()])] == [
        7,
        7,
    ]


def test_extended_inputs_see_faint_change_and_age() -> None:
    config = LACConfig(grids={"c": (2, 2)}, patch_pixels=8)
    image = torch.full((1, 16, 16, 3), 100, dtype=torch.uint8)
    other = image.clone()
    other[:, :8, :8] += 1
    flow, age = torch.zeros(1, 16, 16, 2), torch.tensor([[[0, 4], [8, 99]]])
    out = compose(config, image, flow, other, age)
    assert (out[0, 5:8, :8, :8] > 0.1).all()
    assert (out[0, 5:8, 8:] == 0).all()
    assert [float(out[0, 8, y, x]) for y, x in ((0, 0), (0, 15), (15, 0), (15, 15))] == [0, 0.25, 0.5, 1]


def test_flow_is_counted_in_token_sides() -> None:
    flow = np.tile(np.float32([7, -14]), (28, 28, 1))
    scaled = flow_in_patches(flow, 2, 4, 8)
    assert scaled.shape == (16, 32, 2)
    np.testing.assert_allclose(scaled[0, 0], [1, -1])
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    assert resize(image, 2, 2, 8) is image


def test_a_patch_is_resized_from_its_own_pixels_alone() -> None:
    """So that a reference image put together from patches of several frames means the same after resizing."""
    image = np.zeros((224, 224, 3), np.uint8)
    image[14:28, 28:42] = 200
    small = resize(image, 16, 16, 8)
    assert (small[8:16, 16:24] == 200).all()
    assert small.sum() == 200 * 3 * 64


def test_saliency_lies_in_0_1_and_keeps_its_order_at_any_scale() -> None:
    config = LACConfig(grids=GRIDS, width=16)
    net = Selector(config)
    shown = from_policy_inputs(config, [policy_input()])
    scores = net(shown)
    assert scores.shape == (1, 52)
    assert 0 <= scores.min().item() < scores.max().item() <= 1
    with torch.no_grad():
        net.shift += 0.1
    assert torch.equal(net(shown).argsort(), scores.argsort())


def test_ratio_logits_never_leave_the_range_where_they_can_learn() -> None:
    config = LACConfig(grids=GRIDS, width=16)
    net = Predictor(config)
    torch.nn.init.normal_(net.head.weight, std=1e3)
    logits = net(from_policy_inputs(config, [policy_input()]))
    assert logits.shape == (1, 6)
    assert logits.abs().max().item() <= 3


def test_the_lowest_scores_are_cached_at_the_chosen_ratio() -> None:
    policy = random_policy(recovery=0.0)
    inputs = policy_input()
    decision = policy.decide(inputs)
    shown = from_policy_inputs(policy.config, [inputs])
    with torch.no_grad():
        ratio = policy.config.ratios[int(policy.predictor(shown).argmax())]
        scores = policy.selector(shown)[0].numpy()
    assert decision.nominal_ratio == ratio
    cached = ~decision.active
    assert cached.sum() == int(52 * ratio + 0.5)
    if cached.any() and not cached.all():
        assert scores[cached].max() <= scores[~cached].min()


@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("inputs", ["paper", "extended"])
def test_both_networks_together_are_each_by_itself(inputs: str, depth: int, language: bool) -> None:
    """One pass over all cameras on a canvas, against either network camera by camera."""
    policy = random_policy(inputs=inputs, depth=depth, language=language)
    torch.nn.init.normal_(policy.selector.trunk.camera)
    torch.nn.init.normal_(policy.predictor.trunk.camera)
    observed = policy_input(3)
    text = words([observed.instruction]) if language else None
    with torch.inference_mode():
        apart = from_policy_inputs(policy.config, [observed])
        for with_predictor in (True, False):
            joint = Joint(policy.config, policy.selector, policy.predictor if with_predictor else None)
            canvas, places = joint.canvas(1)
            from_policy_inputs(policy.config, [observed], places)
            [(saliency, logits)] = joint(canvas, text)
            torch.testing.assert_close(saliency, policy.selector(apart, text)[0])
            if with_predictor:
                torch.testing.assert_close(logits, policy.predictor(apart, text)[0])
            assert logits.numel() == (len(policy.config.ratios) if with_predictor else 0)


@pytest.mark.parametrize(("fixed", "language"), [(None, False), (0.7, False), (None, True)])
def test_decisions_about_several_frames_at_once_are_those_one_by_one(fixed: float | None, language: bool) -> None:
    policy = random_policy(fixed=fixed, language=language, recovery=0.2)
    seen = [replace(policy_input(seed), rng=np.random.default_rng(seed), instruction=f"go {seed}") for seed in range(6)]
    alone = [policy.decide(replace(each, rng=np.random.default_rng(k))) for k, each in enumerate(seen)]
    for mine, theirs in zip(policy.decide_together(seen), alone, strict=True):
        assert np.array_equal(mine.exit_layer, theirs.exit_layer)
        assert mine.recovered is not None
        assert theirs.recovered is not None
        assert np.array_equal(mine.recovered, theirs.recovered)
        assert mine.nominal_ratio == theirs.nominal_ratio
    assert len({each.exit_layer.tobytes() for each in alone}) > 1


def test_decisions_are_reproducible_and_recovery_draws_from_the_session() -> None:
    policy = random_policy(fixed=0.9, recovery=0.3)
    first, again = policy.decide(policy_input()), policy.decide(policy_input())
    assert np.array_equal(first.exit_layer, again.exit_layer)
    other = policy.decide(replace(policy_input(), rng=np.random.default_rng(8)))
    assert not np.array_equal(first.exit_layer, other.exit_layer)
    assert first.recovered is not None
    assert first.recovered.sum() == pytest.approx(0.3 * 47, abs=10)
    assert first.active[first.recovered].all()
    assert (~first.active).sum() + first.recovered.sum() == int(52 * 0.9 + 0.5)


def test_the_instruction_matters_with_language_only() -> None:
    for language in (False, True):
        policy = random_policy(fixed=0.5, language=language, recovery=0.0)
        if language:
            torch.nn.init.normal_(policy.selector.trunk.text.weight, std=3)  # type: ignore[union-attr]
        depths = [
            policy.decide(policy_input(instruction=text)).exit_layer for text in ("pick up the bowl", "open the drawer")
        ]
        assert np.array_equal(*depths) != language
    assert torch.equal(words(["Pick up"]), words(["pick UP"]))
    assert float(words(["a b c d"]).sum()) == 1


@pytest.mark.parametrize("recovery", [0.0, 0.2])
def test_no_age_exceeds_the_maximum(recovery: float) -> None:
    model = random_vla(TINY)
    torch.manual_seed(0)
    policy = LACPolicy(LACConfig(grids=dict(model.grids), recovery=recovery, width=16), ratio=0.9)
    session = CachedVLA(model, policy, max_age=4).session()
    oldest = 0
    for seed in range(14):
        session.act(frame(seed % 3))
        assert session.last_info is not None
        oldest = max(oldest, int(session.last_info.age.max()))
    assert 3 <= oldest <= 4


def test_files_give_the_same_policy_back(tmp_path: Path) -> None:
    policy = random_policy(language=True, inputs="paper", recovery=0.1)
    policy.save_pretrained(tmp_path / "p", about={"seconds": 3})
    back = LACPolicy.from_pretrained(tmp_path / "p")
    assert back.config == policy.config
    assert np.array_equal(back.decide(policy_input()).exit_layer, policy.decide(policy_input()).exit_layer)
    assert json.loads((tmp_path / "p" / "config.json").read_text())["about"] == {"seconds": 3}
    assert back.about == {"seconds": 3}
    assert (tmp_path / "p" / "README.md").read_text().startswith("---\nlibrary_name: lac-vla\n")
    overridden = make_policy("lac", path=str(tmp_path / "p"), ratio=0.25, recovery=0.0)
    assert overridden.decide(policy_input()).nominal_ratio == 0.25
    (tmp_path / "run").mkdir()
    (tmp_path / "p").rename(tmp_path / "run" / "policy")
    assert LACPolicy.from_pretrained(tmp_path / "run").config == policy.config


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no policy at"):
        LACPolicy.from_pretrained(tmp_path / "nowhere")
    random_policy().save_pretrained(tmp_path)
    weights = tmp_path / "policy.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"policy\.safetensors cannot be read .*truncated or damaged"):
        LACPolicy.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"width": 24}, r"policy\.safetensors does not fit .*config\.json"),
        ({"model_type": "llama"}, "does not hold a LAC policy"),
        ({"colour": 1}, r"config\.json: .* another version"),
        ({"grids": [1]}, r"config\.json: .* no settings"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            LACPolicy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        LACPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"ratios": (0.25, 0.5)},
        {"ratios": (0.0, 0.9, 0.5)},
        {"ratios": (0.0, 1.5)},
        {"inputs": "both"},
        {"recovery": 2.0},
        {"ratio": -0.5},
        {"width": 0},
        {"grids": {}},
    ],
)
def test_configurations_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        LACConfig(**{"grids": GRIDS, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"width": 10**9}, {"depth": 10**9}, {"patch_pixels": 10**9}, {"max_age": 10**9}])
def test_a_file_cannot_make_a_policy_of_any_size(tmp_path: Path, change: dict[str, int]) -> None:
    random_policy().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} is 1000000000; give a whole number"):
        LACPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(tmp_path: Path, value: float) -> None:
    policy = random_policy()
    with torch.no_grad():
        policy.selector.shift.fill_(value)
    policy.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in the weights selector\.shift"):
        LACPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("flow", ["raft_small:weights.pt", "raft_small:/etc/hosts", "dis:slow", "raft", "https://x/y"])
def test_a_policys_file_names_an_estimator_and_no_file(tmp_path: Path, flow: str) -> None:
    random_policy().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "flow": flow}))
    with pytest.raises(CheckpointError):
        LACPolicy.from_pretrained(tmp_path)


def test_a_policys_flow_is_not_downloaded_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    random_policy(flow="raft_small").save_pretrained(tmp_path)
    policy = LACPolicy.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="raft_small:FILE"):
        CachedVLA(random_vla(TINY), policy)
    assert CachedVLA(random_vla(TINY), policy, flow="dis").flow_used == "dis"


def test_another_layout_is_refused_before_anything_changes() -> None:
    model = random_vla(TINY)
    with pytest.raises(InputError, match=r"made for the token grids.*lac train"):
        CachedVLA(model, LACPolicy(LACConfig(grids={"agentview": (16, 16)})))


def test_a_policy_that_reads_flow_is_not_run_without() -> None:
    model = random_vla(TINY)
    policy = LACPolicy(LACConfig(grids=dict(model.grids), width=16))
    session = CachedVLA(model, policy, flow="none").session()
    session.act(frame(0))
    with pytest.raises(InputError, match="reads optical flow"):
        session.act(frame(1))


@pytest.mark.parametrize("folder", [MINI, MINI_COGACT], ids=lambda folder: folder.name)
def test_the_bundled_policy_fits_the_bundled_model(folder: Path) -> None:
    policy = LACPolicy.from_pretrained(folder)
    model = load_vla(folder)
    CachedVLA(model, policy)
    assert policy.config.flow == "dis"
    assert sum(weight.numel() for weight in policy.networks.parameters()) <= 300_000
    about = json.loads((folder / "policy" / "config.json").read_text())["about"]
    assert about["seconds"] <= 30 * 60
    assert "lac train" in about["trained_with"]["command"]


def test_train_is_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "target-ratio" in capsys.readouterr().out


def test_weights_trained_after_the_first_decision_are_not_half_seen() -> None:
    policy = random_policy(recovery=0.0)
    first = policy.decide(policy_input())
    with torch.no_grad():
        for weight in [*policy.selector.parameters(), *policy.predictor.parameters()]:
            weight.mul_(-1.7).add_(0.1)
    assert np.array_equal(policy.decide(policy_input()).exit_layer, first.exit_layer)
    policy.ratio = 0.25
    assert policy.decide(policy_input()).nominal_ratio == 0.25
    policy.ratio = None
    assert policy.decide(policy_input()).nominal_ratio in policy.config.ratios
