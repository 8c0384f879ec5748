"""The baseline of SmolVLA, π0 and π0.5: LeRobot's own policy over the same weights, as a robot's session."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from lac_vla.bench.lerobot_policy import FAMILIES, OpenedPolicy, lerobot_module
from lac_vla.bench.stock import dense_info, torchs_attention
from lac_vla.cost import count_macs
from lac_vla.engine.step_info import StepInfo
from lac_vla.errors import InputError
from lac_vla.models import VLA, save_vla
from lac_vla.session import head_rng
from lac_vla.timing import Stopwatch
from lac_vla.types import FloatArray, Frame

TIMED = {"sample_actions": "decode", "embed_image": "tower", "forward": "prefill"}
"""Methods of LeRobot's, and the stages that they are."""


class _Given:
    """Stands for a tokenizer: gives the ids that the model itself reads, padded as asked for."""

    pad_token_id = 0
    ids: Sequence[int] = ()

    def __call__(self, text: Any, *, max_length: int, padding: Any, **_: Any) -> dict[str, torch.Tensor]:
        length = max_length if padding == "max_length" else len(self.ids)
        ids, mask = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64)
        ids[0, : len(self.ids)], mask[0, : len(self.ids)] = torch.tensor(self.ids), 1
        return {"input_ids": ids, "attention_mask": mask}


class LeRobotSession:
    """A robot's session on LeRobot's own policy: nothing is kept from one frame to the next.

    ``tower`` is all of ``embed_image``, the connector with it; ``prefill`` the prefix's pass; ``decode`` what is left
    of ``sample_actions``; ``preprocess`` the processors and the resizing.

    Args:
        model: One of :data:`FAMILIES`; its weights are written to a file and read by LeRobot.
        seed: Of the noise: the same as in a session of this seed.
        empty_cameras: Masked cameras that LeRobot computes besides, as many checkpoints of π0 and π0.5 have.

    Attributes:
        last_info: Report of the last frame.
        described: What it is, for tables.

    Raises:
        MissingExtraError: If there is no LeRobot.
        InputError: If it has no such policy.
    """

    def __init__(self, model: VLA, seed: int = 0, empty_cameras: int = 0) -> None:
        if model.family not in FAMILIES:
            raise InputError(f"{model.name} is no model of LeRobot's, {list(FAMILIES)}: leave out --lerobot")
        version = lerobot_module("__version__").__version__
        self.last_info: StepInfo | None = None
        self._model, self._seed, self._rng, self._given = model, seed, head_rng(seed), _Given()
        with TemporaryDirectory() as folder:
            save_vla(model, folder, dtype=model.dtype)
            file = Path(folder) / "config.json"
            settings = json.loads(file.read_text(encoding="utf-8")) | {"empty_cameras": empty_cameras}
            file.write_text(json.dumps(settings), encoding="utf-8")
            self._opened = OpenedPolicy(Path(folder), model, self._given, own_processors=False)
        core = self._opened.policy.model
        self.described = f"LeRobot {version}'s own policy over the same weights, its processors included"
        self.described += f"; {empty_cameras} empty camera(s) besides" if empty_cameras else ""
        self._stack = core.vlm_with_expert if model.family == "smolvla" else core.paligemma_with_expert
        self._clock, self._seen = Stopwatch(model.device, events=True), set[str]()
        self._calls: dict[str, list[Callable[[], Any]]] = {}
        self._macs: Mapping[str, int] | None = None
        for name in TIMED:
            owner = core if name == "sample_actions" else self._stack
            setattr(owner, name, self._timed(getattr(owner, name), name))

    def reset(self) -> None:
        """Begin a new episode."""
        self.last_info, self._rng = None, head_rng(self._seed)

    def _timed(self, work: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if name == "forward" and name in self._seen:  # of the prefix and ten steps, the prefix comes first
                return work(*args, **kwargs)
            self._seen.add(name)
            with self._clock.stage(TIMED[name]):
                out = work(*args, **kwargs)
            if self._macs is None:
                self._calls.setdefault(name, []).append(lambda: work(*args, **kwargs))
            return out

        return timed

    @torchs_attention()
    @torch.inference_mode()
    def act(self, frame: Frame) -> FloatArray:
        """Answer an observation with a chunk in the robot's own units, float32."""
        model, head, opened = self._model, self._model.head, self._opened
        prompt = model.processor.prompt(frame)
        self._given.ids, self._seen, self._clock = prompt.ids, set(), Stopwatch(model.device, events=True)
        noise: Any = self._rng.standard_normal((head.horizon, model.config.flow.width), dtype=np.float32)
        with self._clock.stage("preprocess"):
            batch = opened.before(opened.batch(frame, list(model.grids)))
            chunk = opened.policy.predict_action_chunk(batch, noise=torch.from_numpy(noise)[None].to(model.device))
            action = opened.after(chunk.clone())[0]
        stages = dict(self._clock.stages)  # each with those that it holds
        stages["preprocess"] -= stages["decode"]
        stages["decode"] -= stages["tower"] + stages["prefill"]
        if self._macs is None:
            self._macs = {}  # what follows is counted once
            calls = self._calls
            every, eye, prefix = (count_macs(calls[name][0]) for name in ("sample_actions", "embed_image", "forward"))
            eyes = eye * len(calls["embed_image"])  # the cameras' pictures have one size
            self._calls = {}
            self._macs = {"tower": eyes, "prefill": prefix, "head": every - eyes - prefix}
        self.last_info = dense_info(
            prompt.layout,
            model.n_layers,
            dense_reason="LeRobot's own policy",
            stages=stages,
            metadata={"normalized": chunk[0].float().cpu().tolist()},
            pixels=model.processor.images(frame),
        )
        answer: FloatArray = np.asarray(action.float().cpu().numpy(), dtype=np.float32)
        return answer

    def step(self, step: StepInfo) -> dict[str, int]:
        """Count as :meth:`lac_vla.cost.CostModel.step` does, but what LeRobot's own code multiplies."""
        parts = dict.fromkeys(("flow", "policy", "tower", "projector", "prefill", "decode", "head"), 0)
        return {**parts, **(self._macs or {})}
