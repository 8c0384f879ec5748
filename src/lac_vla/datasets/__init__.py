"""Robot episodes in the LeRobotDataset v3.0 layout: written, read."""

from lac_vla.datasets.append import DatasetAppender
from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.lerobot import Episode, EpisodeImages, LeRobotDataset
from lac_vla.datasets.writer import DatasetWriter

__all__ = [
    "DatasetAppender",
    "DatasetError",
    "DatasetWriter",
    "Episode",
    "EpisodeImages",
    "LeRobotDataset",
]
