"""Configuration of the Prismatic family: OpenVLA's official ``config.json``, and optional fields beyond it.

An official file needs none of the optional fields. They let the same code describe small models: several
cameras, a tower of its own for each, a proprioception token, another prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lac_vla.checks import check_fields, shortened
from lac_vla.errors import CheckpointError
from lac_vla.models.prismatic.towers import DEEPEST, TowerConfig, ViTConfig, tower_of, towers_of

OPENVLA_PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
VICUNA_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
    "USER: What action should the robot take to {instruction}? ASSISTANT:"
)
OPENVLA_PROMPT_END = 29871
"""Llama 2's token of a lone space, the last token of every prompt that OpenVLA was trained with."""
LARGEST_IMAGE = 4096
"""Pixels of a side."""
PER_CAMERA = ("conv", "towers")
"""``vision_backbone_id`` of models with a tower per camera: convolutions only, or any."""


@dataclass(frozen=True)
class CameraConfig:
    """One camera of the model, in token order.

    Attributes:
        name: Key of its image in ``Frame.images``; no dots (it becomes part of parameter names).
        image_size: Side of the square image that the tower sees, pixels.
        tower: The camera's own tower; ``None`` if all cameras share the vision transformers.
    """

    name: str
    image_size: int
    tower: TowerConfig | None = None

    def __post_init__(self) -> None:
        """Check the name, and that the tokens tile the image."""
        check_fields(self, CheckpointError)
        if not 1 <= self.image_size <= LARGEST_IMAGE:
            raise CheckpointError(f"camera '{self.name}': image_size is {self.image_size}; give 1..{LARGEST_IMAGE}")
        if not self.name or "." in self.name:
            raise CheckpointError(f"camera name {self.name!r} must not be empty or hold a dot")
        if self.tower is not None and self.image_size % self.tower.stride:
            raise CheckpointError(
                f"camera '{self.name}': {self.image_size} pixels, no multiple of stride {self.tower.stride}"
            )


@dataclass(frozen=True)
class PrismaticConfig:
    """The contents of a Prismatic VLA's ``config.json``, under the file's own names.

    Attributes:
        text_config: Arguments of ``transformers.LlamaConfig``; what is absent is Llama 2 7B's.
        norm_stats: Data set → ``action`` / ``proprio`` → ``q01``, ``q99``, ``mask`` (lists of numbers).
        vision_backbone_id: One of :data:`PER_CAMERA`, or an official name of vision transformers.
        vit_towers: The vision transformers that cameras share (one, or two whose features are concatenated).
        cameras: Cameras in token order.
        projector_hidden: Hidden widths of the projector.
        image_resize_strategy: A key of :data:`lac_vla.models.images.PIPELINES`.
        prompt_template: Holds ``{instruction}``.
        prompt_end_id: Token that ends every prompt; ``None`` for none.
        proprio_dim: Length of the proprioception vector; ``None`` if the model takes none.
        n_action_bins: Edges of the bins that an action dimension is divided by.
        edge_token: Whether the value +1 has a token of its own, as OpenVLA's tokenizer gives it one (it decodes to the
            highest bin all the same).
        pad_to_multiple_of: Rows of the embedding beyond the tokenizer's vocabulary.
        llm_max_length: Longest prompt, tokens.
        llm_backbone_id: Official name of the language model.
        model_type: Always ``"openvla"``.

    Raises:
        CheckpointError: If the parts contradict each other.
    """

    text_config: Mapping[str, Any]
    norm_stats: Mapping[str, Any]
    vision_backbone_id: str
    vit_towers: tuple[ViTConfig, ...]
    cameras: tuple[CameraConfig, ...]
    projector_hidden: tuple[int, ...]
    image_resize_strategy: str = "resize-naive"
    prompt_template: str = OPENVLA_PROMPT
    prompt_end_id: int | None = OPENVLA_PROMPT_END
    proprio_dim: int | None = None
    n_action_bins: int = 256
    edge_token: bool = True
    pad_to_multiple_of: int = 64
    llm_max_length: int = 2048
    llm_backbone_id: str = "llama2-7b-pure"
    model_type: str = field(default="openvla", init=False)

    def __post_init__(self) -> None:
        """Check the values, and that the parts fit together."""
        check_fields(self, CheckpointError)
        own = [camera.tower for camera in self.cameras if camera.tower is not None]
        if self.vision_backbone_id in PER_CAMERA:
            if len(own) != len(self.cameras) or self.vit_towers:
                raise CheckpointError(
                    f'vision_backbone_id "{self.vision_backbone_id}" wants a tower per camera and no vit_towers'
                )
            if len({tower.features for tower in own}) != 1:
                raise CheckpointError("the towers of all cameras must end in the same width")
        else:
            if own or not 1 <= len(self.vit_towers) <= 2:
                raise CheckpointError("vision transformers: 1 or 2 vit_towers, and cameras without towers")
            if len({(camera.image_size, vit.patch) for camera in self.cameras for vit in self.vit_towers}) != 1:
                raise CheckpointError("vision transformers must have one image_size and one size of patches")
        names = [camera.name for camera in self.cameras]
        if not names or len(set(names)) != len(names):
            raise CheckpointError(f"camera names {names}: give at least one, each once")
        if self.text_config.get("model_type", "llama") != "llama":
            raise CheckpointError(f"language model '{self.text_config['model_type']}' is not supported, only llama")
        if "{instruction}" not in self.prompt_template:
            raise CheckpointError("prompt_template does not hold {instruction}")
        _check_sizes(self)

    @property
    def features(self) -> int:
        """Width of the visual features that the projector takes."""
        own = self.cameras[0].tower
        return own.features if own is not None else sum(tower.features for tower in self.vit_towers)

    @property
    def letterbox_fill(self) -> tuple[int, int, int]:
        """Colour of a letterbox's border: the mean that the last vision transformer normalises by."""
        means = [tower.mean for tower in self.vit_towers] or [(0.5, 0.5, 0.5)]
        red, green, blue = (int(value * 255) for value in means[-1])
        return red, green, blue

    @property
    def width(self) -> int:
        """Width of the decoder."""
        return int(self.text_config.get("hidden_size", 4096))

    @property
    def vocab_size(self) -> int:
        """Size V of the tokenizer's vocabulary; the last ``n_action_bins`` of it mean actions."""
        return int(self.text_config.get("vocab_size", 32000)) - self.pad_to_multiple_of

    @property
    def bos_id(self) -> int:
        """Token that starts every prompt."""
        return int(self.text_config.get("bos_token_id", 1))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrismaticConfig:
        """Read the contents of a ``config.json``, official or ours.

        Raises:
            CheckpointError: If something without a default is missing, or is not supported.
        """
        backbone = str(data.get("vision_backbone_id", "dinosiglip-vit-so-224px"))
        llm = str(data.get("llm_backbone_id", "llama2-7b-pure"))
        if any(data.get("timm_override_act_layers") or ()):
            raise CheckpointError(f'vision backbone "{backbone}" overrides activations: not supported')
        try:
            vit = () if backbone in PER_CAMERA else towers_of(data)
            cameras = tuple(_camera(camera) for camera in data.get("cameras") or ()) or _official_camera(data)
            hidden = tuple(data.get("projector_hidden") or _official_projector(data["text_config"], vit))
            prompt = VICUNA_PROMPT if llm.startswith("vicuna") else OPENVLA_PROMPT
            config: dict[str, Any] = {"prompt_template": prompt}
            config |= {f.name: data[f.name] for f in fields(cls) if f.init and f.name in data}
            config["norm_stats"] = data.get("norm_stats") or {}
            config |= {"vision_backbone_id": backbone, "llm_backbone_id": llm}
            config |= {"vit_towers": vit, "cameras": cameras, "projector_hidden": hidden}
            return cls(**config)
        except CheckpointError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, IndexError) as error:
            raise CheckpointError(f"config.json does not describe a Prismatic VLA: {shortened(error)}") from error

    def to_json(self) -> dict[str, Any]:
        """Make plain data of everything, for ``config.json``; :meth:`from_json` reads it back."""
        data = asdict(self)
        data["image_sizes"] = [camera.image_size for camera in self.cameras]
        data["use_fused_vision_backbone"] = len(self.vit_towers) == 2
        return data


def _check_sizes(config: PrismaticConfig) -> None:
    """Refuse numbers that no model can have, before anything is built of them.

    Raises:
        CheckpointError: If there is one.
    """
    text = config.text_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: text[name] for name in (*names, "head_dim", "vocab_size") if text.get(name) is not None}
    sizes |= {"llm_max_length": config.llm_max_length, "pad_to_multiple_of": config.pad_to_multiple_of + 1}
    sizes |= {f"projector_hidden[{number}]": width for number, width in enumerate(config.projector_hidden)}
    sizes |= {} if config.proprio_dim is None else {"proprio_dim": config.proprio_dim}
    for name, size in sizes.items():
        limit = DEEPEST if name == "num_hidden_layers" else 2**31
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= limit:
            raise CheckpointError(f"config.json: {name} is {shortened(size)}; it must be a whole number, 1..{limit}")
    heads = sizes.get("num_attention_heads", 32)
    if heads % sizes.get("num_key_value_heads", heads) or ("head_dim" not in sizes and config.width % heads):
        raise CheckpointError(f"config.json: {heads} attention heads do not fit the rest of text_config")
    if not 2 <= config.n_action_bins < config.vocab_size:
        raise CheckpointError(
            f"config.json: n_action_bins is {config.n_action_bins}; it must be at least 2, and less than the "
            f"vocabulary of {config.vocab_size}"
        )


def _camera(data: Mapping[str, Any]) -> CameraConfig:
    tower = data.get("tower")
    return CameraConfig(data["name"], data["image_size"], None if tower is None else tower_of(tower))


def _official_camera(data: Mapping[str, Any]) -> tuple[CameraConfig, ...]:
    sizes = data.get("image_sizes", [224])
    if len(set(sizes)) != 1:
        raise CheckpointError(f"image_sizes {sizes}: the towers must see the same size")
    return (CameraConfig("agentview", sizes[0]),)


def _official_projector(text_config: Mapping[str, Any], towers: tuple[ViTConfig, ...]) -> tuple[int, ...]:
    width = int(text_config.get("hidden_size", 4096))
    return (width,) if len(towers) == 1 else (4 * sum(tower.width for tower in towers), width)
