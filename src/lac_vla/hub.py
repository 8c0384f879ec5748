"""Folders of models and policies: local ones, or repositories of the Hugging Face hub, downloaded once."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from huggingface_hub import snapshot_download

from lac_vla.errors import CheckpointError, did_you_mean

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def find_folder(path_or_hub_id: str | Path, files: Iterable[str], known: Collection[str] = ()) -> Path:
    """Find a folder: a local one, or ``owner/name`` on the Hugging Face hub.

    Args:
        path_or_hub_id: What the user gave.
        files: Patterns of what to download.
        known: Names that would have been understood, too.

    Raises:
        CheckpointError: If there is none.
    """
    given = os.path.expanduser(path_or_hub_id)
    if os.path.isdir(given):
        return Path(given)
    if not HUB_ID.fullmatch(given) or os.path.exists(given):
        raise CheckpointError(f"'{path_or_hub_id}' {_no_folder(given, known)}")
    try:
        return Path(snapshot_download(given, allow_patterns=list(files)))
    except Exception as error:  # of the hub, the network, the cache, or what else a client has under it
        raise CheckpointError(f"'{path_or_hub_id}' is no local folder, and the hub says: {error}") from error


def _no_folder(given: str, known: Collection[str]) -> str:
    """Say what a text is that names neither a folder nor a repository, and what to give in its place."""
    if os.path.isfile(given):
        whole = next((folder for folder in Path(given).resolve().parents[:2] if (folder / "config.json").is_file()), "")
        return f"is a file: give the folder of the whole model, which holds its config.json{whole and f': {whole}'}"
    if found := re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", given):
        return f"is an address: give the repository's name, '{found[1]}'"
    if re.match(r"\w+://", given):
        return "is an address: download the model, and give its folder"
    if "@" in given and HUB_ID.fullmatch(given.partition("@")[0]):
        name, _, revision = given.partition("@")
        return (
            f"names a revision, which is not taken here: run 'hf download {name} --revision {revision} --local-dir "
            "FOLDER' and give that folder"
        )
    if "\\" in given or re.match(r"[A-Za-z]:", given):
        return f"is a path of Windows, and no folder {'here' if os.name == 'nt' else 'of this machine'}"
    names = f", nor one of {', '.join(known)}{did_you_mean(given, known)}" if known else ""
    return f"is neither a folder nor a hub id (owner/name){names}"
