"""What a policy varies, from the records of its episodes."""

from __future__ import annotations

import numpy as np
import pytest
from tests.engine.scenes import frame
from tests.results.test_metrics import Walk

from lac_vla import CachedVLA, InputError, random_vla
from lac_vla.evaluation.rollout import EpisodeLog, rollout
from lac_vla.policies.lac import LACConfig, LACPolicy
from lac_vla.results.adaptivity import Adaptivity, collapse_warning, shares_chosen
from lac_vla.results.records import EpisodeRecord
from lac_vla.results.summary import summarize
from lac_vla.results.table import method_tables


def episode(init: int, effective: list[float], *, nominal: list[float | None], adaptive: bool = True) -> EpisodeRecord:
    metrics = {"ratio_effective": effective, "ratio_nominal": nominal}
    reuse = {"front": effective, "wrist": [0.5 * ratio for ratio in effective]}
    return EpisodeRecord("lac", "walk", 0, "walk", init, 0, True, 3, 9, metrics=metrics, reuse=reuse, adaptive=adaptive)


def test_what_varies_by_hand() -> None:
    episodes = [
        episode(0, [0.0, 0.8, 0.6], nominal=[0.0, 0.8, 0.6]),
        episode(1, [0.0, 0.8, 0.8], nominal=[None, 0.8, 0.8]),
    ]
    found = Adaptivity.of(episodes)
    assert found.shares == pytest.approx({0.8: 0.6, 0.0: 0.2, 0.6: 0.2})
    assert found.deviation == pytest.approx(0.05), "0.1 and 0, full frames left out"
    assert found.cameras == pytest.approx({"front": 0.5, "wrist": 0.25})
    assert found.warning is None
    to_and_fro = Adaptivity.of([episode(0, [0.9, 0.0, 0.9, 0.0], nominal=[0.9, 0.0, 0.9, 0.0])])
    assert to_and_fro.deviation == pytest.approx(0.45), "a ratio of 0 was chosen"
    forced = Adaptivity.of([episode(0, [0.0, 0.8, 0.0, 0.6], nominal=[None, 0.8, None, 0.6])])
    assert forced.deviation == pytest.approx(0.1)
    aimless = Adaptivity.of([episode(0, [0.0, 0.8, 0.0, 0.6], nominal=[None] * 4)])
    assert aimless.deviation == pytest.approx(0.1)
    tables = {table.title: table for table in method_tables(summarize(episodes))}
    row = dict(zip(tables["Per call of the model"].headings, tables["Per call of the model"].rows[0], strict=True))
    assert row["ratios chosen"] == "80 %: 60 %\n0 %: 20 %\n60 %: 20 %"
    assert row["deviation in an episode"] == "0.050"
    assert row["reused of each camera"] == "front 50 %\nwrist 25 %"


def test_one_value_is_warned_of_where_it_was_a_choice() -> None:
    always = [0.8] * 40
    for adaptive in (True, False):
        episodes = [episode(0, [0.0, *always], nominal=[0.0, *always], adaptive=adaptive)]
        notes = " ".join(method_tables(summarize(episodes))[0].notes)
        assert ("lac: the ratio predictor has collapsed to one value: 80 % in 98 %" in notes) == adaptive
    assert collapse_warning({0.8: 0.94, 0.9: 0.06}) is None
    assert collapse_warning({}) is None


@pytest.mark.parametrize("row", [{"held_out_share_half": 0.5}, {"held_out_share_0.5": "much"}])
def test_a_damaged_share_is_told(row: dict[str, float]) -> None:
    with pytest.raises(InputError, match="delete its line"):
        shares_chosen(row)


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_an_episode_records_what_its_cameras_reuse(ratio: float | None) -> None:
    vla = random_vla("tiny")
    policy = LACPolicy(LACConfig(vla.grids, flow="none"), ratio=ratio, recovery=0.0)
    session = CachedVLA(vla, policy).session()
    record = rollout(EpisodeLog(Walk(), session, "lac", 0))  # type: ignore[arg-type]
    first, *others = record.metrics["ratio_nominal"]
    assert first is None, "a frame that is computed in full whatever the policy"
    assert None not in others
    assert record.adaptive == (ratio is None)
    assert EpisodeRecord.from_json(record.to_json()) == record
    sizes = {name: rows * cols for name, (rows, cols) in vla.grids.items()}
    assert set(record.reuse) == set(sizes) <= set(frame(0).images)
    together = sum(sizes[name] * np.array(values) for name, values in record.reuse.items()) / sum(sizes.values())
    assert together == pytest.approx(record.metrics["ratio_effective"], abs=1e-3)
