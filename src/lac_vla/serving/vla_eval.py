"""A model server for vla-eval, the evaluation harness: ``python -m lac_vla.serving.vla_eval --args.model mini``.

Every episode is a session; the observations that wait are answered in one batch. Conventions of images and actions are
those of the model: give ``rotate`` if the benchmark's pictures are turned by 180° against it, as vla-eval's LIBERO's
are against the bundled models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lac_vla.errors import InputError, MissingExtraError
from lac_vla.factory import CachedVLA, ModelOptions
from lac_vla.session import Session, plan_together
from lac_vla.types import Frame

try:
    from vla_eval.model_servers.predict import PredictModelServer
    from vla_eval.model_servers.serve import run_server
    from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW
except ModuleNotFoundError as error:
    raise MissingExtraError("vla-eval", "Serving vla-eval") from error


class LacModelServer(PredictModelServer):  # type: ignore[misc, unused-ignore]
    """Implements vla-eval's ``predict`` and ``predict_batch``.

    Args:
        model: Checkpoint folder, bundled name or hub id.
        policy: See :func:`lac_vla.factory.load_methods`.
        device: ``cpu`` or ``cuda``.
        threads: CPU threads; 0 leaves it to torch.
        rotate: Turn pictures by 180°.
        chunk_size: Actions of an answer that are executed before the model is asked again.
        max_batch_size: Observations that are answered together, at most.
        options: As ``PredictModelServer`` takes them.
    """

    def __init__(
        self, model: str = "mini", policy: str = "lac", device: str = "cpu", threads: int = 0, rotate: bool = False,
        *, chunk_size: int = 1, max_batch_size: int = 8, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(chunk_size=chunk_size, max_batch_size=max_batch_size, **options)
        self.vla, self.rotate = CachedVLA.from_pretrained(model, policy, ModelOptions(device, threads=threads)), rotate
        self._sessions: dict[str, Session] = {}

    def predict_batch(self, obs_batch: Sequence[Mapping[str, Any]], ctx_batch: Sequence[Any]) -> list[dict[str, Any]]:
        """Answer observations of different episodes; one that cannot be answered is the others' no concern."""
        answers: list[dict[str, Any]] = [{} for _ in obs_batch]
        asked: list[tuple[int, Session, Frame]] = []
        for index, (obs, ctx) in enumerate(zip(obs_batch, ctx_batch, strict=True)):
            if (session := self._sessions.get(ctx.episode_id)) is None:
                session = self._sessions[ctx.episode_id] = self.vla.session()
                session.steps_per_frame = self.chunk_size
            try:
                asked.append((index, session, self._frame(obs)))
            except InputError as error:
                answers[index] = {"error": error}
        planned = []
        for (index, session, _), plan in zip(asked, plan_together([pair[1:] for pair in asked]), strict=True):
            if isinstance(plan, Exception):
                answers[index] = {"error": plan}
            else:
                planned.append((index, session, plan))
        for (index, session, plan), result in zip(
            planned, self.vla.engine.run([plan for *_, plan in planned]), strict=True
        ):
            try:
                session.commit(plan, result)
                answers[index] = {"actions": result.action}
            except Exception as error:  # of this episode alone
                answers[index] = {"error": error}
        return answers

    async def _process_and_send(self, result: dict[str, Any], ctx: Any) -> None:
        if "error" in result:
            raise result["error"]  # the harness tells it to the client that asked
        await super()._process_and_send(result, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: Any) -> None:
        """Forget the episode; the harness says so, too, when a connection is lost."""
        if (session := self._sessions.pop(ctx.episode_id, None)) is not None:
            session.release()
        await super().on_episode_end(result, ctx)

    def get_observation_params(self) -> dict[str, Any]:
        """Ask for what the model needs."""
        processor = self.vla.model.processor
        return {"send_wrist_image": len(processor.grids) > 1, "send_state": processor.state_dim is not None}

    def get_action_spec(self) -> dict[str, Any]:
        """Leave the actions' meaning to the checkpoint."""
        return {"action": RAW}

    def get_observation_spec(self) -> dict[str, Any]:
        """Name what the model sees."""
        return {**dict.fromkeys(self.vla.model.grids, IMAGE_RGB), "language": LANGUAGE}

    def _frame(self, obs: Mapping[str, Any]) -> Frame:
        """Make a frame; cameras that have other names in the benchmark are taken in their order."""
        images, cameras = obs.get("images"), list(self.vla.model.grids)
        if not isinstance(images, Mapping) or len(images) < len(cameras):
            raise InputError(f"the observation needs images of {cameras}; it has {sorted(images or ())}")
        if not set(cameras) <= set(images):
            images = dict(zip(cameras, images.values(), strict=False))
        turn = slice(None, None, -1 if self.rotate else None)
        seen = {camera: np.ascontiguousarray(np.asarray(images[camera])[turn, turn]) for camera in cameras}
        state = obs.get("states", obs.get("state"))
        return Frame(seen, str(obs.get("task_description", "")), None if state is None else np.asarray(state))


if __name__ == "__main__":
    run_server(LacModelServer)
