"""Robot episodes in the LeRobotDataset v3.0 layout: written, read."""

from lac_vla.errors import MissingExtraError

try:
    import av  # noqa: F401 # of the extra; from here on, all modules of this folder may rely on it
    import pyarrow  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtraError("data", "Reading and writing datasets") from error

from lac_vla.datasets.append import DatasetAppender
from lac_vla.datasets.layout import DatasetError
from lac_vla.datasets.lerobot import LeRobotDataset
from lac_vla.datasets.writer import DatasetWriter

__all__ = ["DatasetAppender", "DatasetError", "DatasetWriter", "LeRobotDataset"]
