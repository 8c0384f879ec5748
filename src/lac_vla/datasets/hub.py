"""Data sets on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from lac_vla.datasets.layout import DatasetError
from lac_vla.hub import HUB_ID


@dataclass
class HubDataset:
    """A data set given by its id; what was downloaded once is taken from the cache.

    Attributes:
        name: ``owner/name``.
        revision: The commit whose files are read; that of the first ones for all.
    """

    name: str
    revision: str | None = None

    @classmethod
    def find(cls, dataset: Path) -> HubDataset | None:
        """Tell if an id is meant; a folder, and a path into a folder that is there, are local ones."""
        text = dataset.as_posix()
        if os.path.exists(dataset) or os.path.exists(dataset.parent) or not HUB_ID.fullmatch(text):
            return None
        return cls(text)

    def fetch(self, files: Sequence[str]) -> Path:
        """Download files, given by names or patterns, and return the folder that they are in.

        Raises:
            DatasetError: If there are none, or the hub cannot be asked.
        """
        try:
            folder = snapshot_download(
                self.name, repo_type="dataset", revision=self.revision, allow_patterns=list(files)
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise DatasetError(f"there is no dataset at {self.name}, and the hub says: {reason}") from error
        self.revision = Path(folder).name
        return Path(folder)
