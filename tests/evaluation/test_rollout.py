"""One episode: what a robot executes of a model that answers with chunks."""

from __future__ import annotations

import numpy as np
import pytest
from tests.engine.scenes import frame

from lac_vla import CachedVLA, Frame, InputError, Random, random_vla
from lac_vla.evaluation.ensemble import AdaptiveEnsemble
from lac_vla.evaluation.rollout import rollout
from lac_vla.models.cogact.config import TINY_COGACT


class Film:
    """Shows the same pictures whatever is done, and remembers what that was."""

    suite, task, instruction, horizon = "film", 0, "watch", 5

    def reset(self, init_state: int, seed: int = 0) -> Frame:
        self.actions: list[np.ndarray] = []
        return frame(0)

    def step(self, action: np.ndarray) -> tuple[Frame, bool]:
        self.actions.append(action)
        return frame(len(self.actions)), False


@pytest.mark.parametrize("horizon", [None, 3])
def test_chunks_are_executed_one_action_per_frame(horizon: int | None) -> None:
    vla, film = CachedVLA(random_vla(TINY_COGACT, seed=1), Random(0.5)), Film()
    session = vla.session(seed=4)
    chunks = [session.act(frame(i)) for i in range(film.horizon)]
    single = AdaptiveEnsemble(horizon or 1)  # of one chunk: its first action
    expected = [single(chunk) for chunk in chunks]
    ensemble = None if horizon is None else AdaptiveEnsemble(horizon)
    for _ in range(2):  # a second episode knows nothing of the first
        rollout(film, vla.session(), "random", 0, seed=4, ensemble=ensemble)
        np.testing.assert_allclose(film.actions, expected, rtol=1e-6)


def test_an_ensemble_needs_a_model_that_answers_with_chunks() -> None:
    vla = CachedVLA(random_vla("tiny"))
    with pytest.raises(InputError, match="needs that many actions"):
        rollout(Film(), vla.session(), "dense", 0, ensemble=AdaptiveEnsemble(2))


def test_a_new_instruction_starts_the_ensemble_anew() -> None:
    class Changing(Film):
        def step(self, action: np.ndarray) -> tuple[Frame, bool]:
            seen, done = super().step(action)
            words = seen.instruction if len(self.actions) < 2 else "now something else"
            return Frame(seen.images, words), done

    vla = CachedVLA(random_vla(TINY_COGACT, seed=1))
    averaged, single = Changing(), Changing()
    rollout(averaged, vla.session(), "dense", 0, ensemble=AdaptiveEnsemble(3))
    rollout(single, vla.session(), "dense", 0)
    same = [np.allclose(a, b) for a, b in zip(averaged.actions, single.actions, strict=True)]
    assert same == [True, False, True, False, False]
