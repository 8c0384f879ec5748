"""Models from outside: a plug-in is a function that makes a :class:`VLA`, see :mod:`lac_vla.plugins`.

Its signature is ``load(*, device, dtype, **options) -> VLA``, where the options, with their defaults, are its own. It
is named by the entry point of a package, or as ``module:load``, options behind it: ``module:load:width=64``. A folder
whose ``config.json`` has the name of an entry point as ``model_type`` is loaded with the further argument ``path``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lac_vla import plugins
from lac_vla.errors import InputError
from lac_vla.models.vla import VLA


def is_plugin(text: str) -> bool:
    """Tell whether a text names a plug-in, not a folder, a bundled model or a hub id."""
    if os.path.isdir(os.path.expanduser(text)):
        return False
    name = text.partition(":")[0]
    return bool(plugins.OBJECT.match(text)) or name in plugins.announced(plugins.MODELS)


def load_plugin(
    text: str, *, device: torch.device, dtype: torch.dtype, settings: Mapping[str, Any], path: Path | None = None
) -> VLA:
    """Load the model of a plug-in.

    Args:
        text: ``name[:option=value,…]``; the name is an entry point's, or ``module:function``.
        device: Where its weights are to be.
        dtype: Of its weights.
        settings: What the user asked for besides, by name; all of it must be among the plug-in's arguments.
        path: The folder that is to be loaded.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: If there is no such plug-in, it has no such option or setting, or it makes no model.
    """
    name, options = plugins.split_spec(text)
    factory = plugins.find_plugin(plugins.MODELS, name)
    if factory is None:
        raise InputError(f"unknown model plug-in {name!r}; known are {sorted(plugins.announced(plugins.MODELS))}")
    given = {**settings, **({} if path is None else {"path": path}), "device": device, "dtype": dtype}
    if unknown := sorted(given.keys() - plugins.options_of(factory)):
        advice = "it must take both" if "device" in unknown or "dtype" in unknown else "leave it out"
        raise InputError(f"the model plug-in {name!r} takes no {', '.join(unknown)}: {advice}")
    vla = plugins.make(f"model {name!r}", factory, options, **given)
    if not isinstance(vla, VLA):
        raise InputError(f"the model plug-in {name!r} made a {type(vla).__name__}; it must be a VLA")
    vla.module.eval()
    return vla
