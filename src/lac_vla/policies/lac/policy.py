"""LAC: learned adaptive caching.

*Learning to Accelerate Vision-Language-Action Models through Adaptive Visual Token Caching*, arXiv 2602.00686.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import nn

from lac_vla.checkpoint_files import check_finite_weights, check_tensors, read_json, read_safetensors
from lac_vla.errors import CheckpointError, InputError
from lac_vla.files import write_object, write_whole
from lac_vla.hub import HUB_ID, find_folder
from lac_vla.policies.base import CachePolicy, cache_lowest, check_ratio
from lac_vla.policies.lac.card import model_card
from lac_vla.policies.lac.config import LACConfig
from lac_vla.policies.lac.deltas import Deltas, mean_flow
from lac_vla.policies.lac.inputs import WORDS, flow_in_patches, from_policy_inputs, words
from lac_vla.policies.lac.joint import Joint, canvas_tokens
from lac_vla.policies.lac.networks import HIDDEN, Predictor, Selector
from lac_vla.types import BoolArray, Decision, PolicyInput

CONFIG, WEIGHTS, CARD = "config.json", "policy.safetensors", "README.md"
SUBFOLDER = "policy"
"""The subfolder in which a training run, or a model, keeps its policy."""
POLICY_FILES = tuple(f"{folder}{name}" for folder in ("", f"{SUBFOLDER}/") for name in (CONFIG, WEIGHTS))
"""All that is downloaded of a repository."""
MODEL_TYPE = "lac-policy"


class LACPolicy(CachePolicy):
    """A selector scores the visual tokens, a predictor chooses the share to reuse; some of these are refreshed anyway.

    Inference (paper): the ratio r by argmax, without noise; the round(N·r) tokens with the lowest saliency are
    cached; each of these is recomputed anyway with the probability ``recovery``, drawn from the session's generator.
    The session's maximum age bounds every slot's age besides. The weights are copied at the first decision: what is
    trained or loaded after it needs another policy.

    Args:
        config: Its shape.
        selector: Trained weights; new ones by default.
        predictor: As ``selector``.
        ratio: A fixed cache ratio in place of ``config.ratio`` and of the predictor's choice.
        recovery: In place of ``config.recovery``; 0 switches recovery off.
        deltas: Whether the predicted changes of reused slots are added to them.

    Attributes:
        config: Its shape.
        selector: Cached Token Selector, eq. 4.
        predictor: Cache Ratio Predictor, eq. 5.
        delta_network: Predicts the changes of reused slots; ``None`` for a policy without.
        about: How the policy came about, plain data; kept in its configuration.

    Raises:
        InputError: If ``ratio`` or ``recovery`` lies outside [0, 1], or it predicts no changes that could be added.
    """

    def __init__(
        self,
        config: LACConfig,
        selector: Selector | None = None,
        predictor: Predictor | None = None,
        *,
        ratio: float | None = None,
        recovery: float | None = None,
        deltas: bool = False,
    ) -> None:
        if deltas and config.slots is None:
            raise InputError(
                "this policy predicts no changes of reused slots: leave out deltas, or train it to "
                "(lac train --start POLICY --delta-steps)"
            )
        if ratio is not None:
            check_ratio(ratio)
        if recovery is not None and not 0 <= recovery <= 1:
            raise InputError(f"recovery is the chance of a cached token to be recomputed, in 0..1; got {recovery}")
        self.config = config
        self.selector = Selector(config) if selector is None else selector
        self.predictor = Predictor(config) if predictor is None else predictor
        self.ratio = config.ratio if ratio is None else ratio
        self.recovery = config.recovery if recovery is None else recovery
        self.delta_network = None if config.slots is None else Deltas(config)
        self._adds_deltas = deltas
        self.about: Mapping[str, Any] = {}
        self._joint: Joint | None = None

    @property
    def networks(self) -> nn.ModuleDict:
        """The networks by name, as they are saved."""
        networks: dict[str, nn.Module] = {"selector": self.selector, "predictor": self.predictor}
        return nn.ModuleDict(networks if self.delta_network is None else {**networks, "deltas": self.delta_network})

    @property
    def flow(self) -> str:
        """The flow it was trained with."""
        return self.config.flow

    @property
    def adaptive(self) -> bool:
        """See :attr:`CachePolicy.adaptive`: unless its ratio is fixed."""
        return self.ratio is None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of both networks per decision, the canvas's empty columns included."""
        config = self.config
        stem = config.channels * config.patch_pixels**2 * config.width
        trunk = canvas_tokens(config.grids) * (stem + config.depth * 9 * config.width**2)
        text = WORDS * config.width if config.language else 0
        selector = trunk + text + config.n_visual * config.width
        if self.ratio is not None:
            return selector
        readout = HIDDEN * (2 * config.width * len(config.grids) + config.proprio + len(config.ratios))
        return selector + trunk + text + readout

    def check_layout(self, grids: Mapping[str, tuple[int, int]]) -> None:
        """Refuse a model with other token grids than those it was made for; cameras may have other names.

        Raises:
            InputError: If they differ.
        """
        if list(grids.values()) != list(self.config.grids.values()):
            raise InputError(
                f"this policy was made for the token grids {dict(self.config.grids)}, the model has {dict(grids)}: "
                "train one for this model (lac train)"
            )

    @property
    def slot_macs(self) -> int:
        """Multiply-accumulates of the predicted change of one reused slot."""
        return self.delta_network.macs if self.delta_network is not None and self._adds_deltas else 0

    def check_slots(self, layers: int, heads: int, width: int) -> None:
        """See :meth:`CachePolicy.check_slots`."""
        if self._adds_deltas and self.config.slots != (layers, heads, width):
            raise InputError(
                f"this policy predicts keys and values of (layers, heads, width) {self.config.slots}, the model's are "
                f"{(layers, heads, width)}: leave out deltas, or train it beside this model"
            )

    @property
    def reads_state(self) -> bool:
        """Tell whether it decides by proprioception, too: at a fixed ratio nothing reads it."""
        return bool(self.config.proprio) and self.ratio is None

    def check_state(self, values: int | None) -> None:
        """See :meth:`CachePolicy.check_state`."""
        if self.reads_state and values != self.config.proprio:
            raise InputError(
                f"this policy reads {self.config.proprio} values of proprioception, the model {values or 'none'}: "
                "train one for this model (lac train), without --proprio if it takes none"
            )

    @torch.inference_mode()
    def deltas(self, inputs: PolicyInput, reused: BoolArray) -> torch.Tensor | None:
        """See :meth:`CachePolicy.deltas`."""
        network = self.delta_network
        if network is None or not self._adds_deltas:
            return None
        at, flow = torch.from_numpy(np.flatnonzero(reused)), None
        if network.reads_flow:
            parts = []
            for camera in inputs.layout.cameras:
                own = flow_in_patches(inputs.flow[camera.name], camera.rows, camera.cols, self.config.patch_pixels)
                parts.append(mean_flow(torch.from_numpy(own)[None], camera.rows, camera.cols))
            flow = torch.cat(parts, dim=1)[:, at]
        changes: torch.Tensor = network(flow, torch.from_numpy(inputs.age)[None, at], network.embedding[at])
        return changes[:, :, 0]

    @torch.inference_mode()
    def decide(self, inputs: PolicyInput) -> Decision:
        """See :meth:`CachePolicy.decide`.

        Raises:
            InputError: If the layout of the inputs is not that of the policy, or it lacks the flow.
        """
        [decision] = self.decide_together([inputs])
        return decision

    @torch.inference_mode()
    def decide_together(self, inputs: Sequence[PolicyInput]) -> list[Decision]:
        """See :meth:`CachePolicy.decide_together`: both networks run over a canvas of all frames.

        Raises:
            InputError: As :meth:`decide` does.
        """
        for each in inputs:
            self.check_layout(each.layout.grids)
            if self.config.flow != "none" and not each.flow:
                raise InputError(
                    f"this policy reads optical flow ({self.config.flow}), the session estimates none: "
                    "leave CachedVLA's `flow` unset"
                )
            wanted, told = self.config.proprio if self.reads_state else 0, each.proprio
            if wanted and (told is None or told.shape != (wanted,)):
                given = "none" if told is None else told.size
                raise InputError(f"this policy reads {wanted} values of proprioception, the frame has {given}")
        fixed = self.ratio is not None
        if self._joint is None or self._joint.alone != fixed:
            self._joint = Joint(self.config, self.selector, None if fixed else self.predictor)
        canvas, places = self._joint.canvas(len(inputs))
        from_policy_inputs(self.config, inputs, places)
        text = words([each.instruction for each in inputs]) if self.config.language else None
        rows = [each.proprio for each in inputs if each.proprio is not None]
        states = torch.from_numpy(np.stack(rows)) if self.reads_state else None
        return [
            self._decision(each, saliency, logits)
            for each, (saliency, logits) in zip(inputs, self._joint(canvas, text, states), strict=True)
        ]

    def _decision(self, inputs: PolicyInput, saliency: torch.Tensor, logits: torch.Tensor) -> Decision:
        """Decide by the tokens' saliency, (N,), and logits over the ratios, (C,)."""
        ratio = self.config.ratios[int(logits.argmax())] if self.ratio is None else self.ratio
        cached = cache_lowest(saliency.numpy(), ratio)
        recovered = cached & (inputs.rng.random(cached.size) < self.recovery)
        return Decision.reuse(cached & ~recovered, inputs.n_layers, recovered=recovered, nominal_ratio=ratio)

    def save_pretrained(self, folder: str | Path, *, card: str = "", about: Mapping[str, Any] | None = None) -> None:
        """Write configuration, weights (safetensors) and model card.

        Args:
            folder: Made if need be; files of these names in it are replaced.
            card: The model card, Markdown; by default one is written from what is known.
            about: How the policy came about, plain data, in place of :attr:`about`.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        about = self.about if about is None else about
        config = {"model_type": MODEL_TYPE, **self.config.to_json(), "about": dict(about)}
        state = {key: value.detach().cpu().contiguous() for key, value in self.networks.state_dict().items()}
        write_whole(folder / WEIGHTS, lambda partial: save_file(state, partial, metadata={"format": "pt"}))
        write_object(folder / CONFIG, config)
        write_whole(folder / CARD, card or model_card(self.config, about))

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, card: str = "", token: str | None = None, message: str = ""
    ) -> str:
        """Upload configuration, weights and model card to the Hugging Face hub; :meth:`from_pretrained` reads them.

        Args:
            repo_id: ``owner/name``; made if need be.
            private: Whether a new repository is private.
            card: See :meth:`save_pretrained`.
            token: Of the hub; by default that of ``hf auth login``.
            message: Of the commit.

        Returns:
            Address of the commit.

        Raises:
            InputError: If this is no repository's name, or the hub refuses.
        """
        if not HUB_ID.fullmatch(repo_id):
            raise InputError(f"{repo_id!r} names no repository; give owner/name")
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, card=card or model_card(self.config, self.about, repo_id))
            try:
                api = HfApi(token=token)
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=message or "Upload a LAC policy"
                )
            except Exception as error:  # of the hub, the network, or what else a client has under it
                raise InputError(f"cannot push to {repo_id} ({error}): log in with 'hf auth login'") from error
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, ratio: float | None = None, recovery: float | None = None, deltas: bool = False
    ) -> LACPolicy:
        """Read what :meth:`save_pretrained` wrote. Nothing is unpickled.

        Args:
            path: The folder, or one that holds it as ``policy``, as a training run's does; or ``owner/name`` of such a
                one on the Hugging Face hub, downloaded once.
            ratio: See :class:`LACPolicy`.
            recovery: See :class:`LACPolicy`.
            deltas: See :class:`LACPolicy`.

        Raises:
            InputError: If it predicts no changes, and is to add them.
            CheckpointError: If a file is missing or damaged, or is something else.
        """
        try:
            folder = find_folder(path, POLICY_FILES)
        except CheckpointError as error:
            raise CheckpointError(f"there is no policy at {path}: {error}") from error
        if (folder / SUBFOLDER / CONFIG).is_file():
            folder = folder / SUBFOLDER
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"there is no policy at {folder}: it holds no {CONFIG}")
        file, weights = folder / CONFIG, folder / WEIGHTS
        data = read_json(file)
        if data.pop("model_type", None) != MODEL_TYPE:
            raise CheckpointError(f"{folder} does not hold a LAC policy: give the folder that `lac train` wrote")
        about = data.pop("about", None)
        try:
            config = LACConfig.from_json(data)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
        with torch.device("meta"):
            policy = cls(config, ratio=ratio, recovery=recovery, deltas=deltas)
        state = check_tensors(weights, read_safetensors(weights))
        try:
            policy.networks.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{weights} does not fit {file}, of which run is it? {error}") from error
        check_finite_weights(weights, policy.networks)
        policy.networks.eval()
        policy.about = about if isinstance(about, dict) else {}
        return policy
