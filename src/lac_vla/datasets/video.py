"""Videos of datasets: H.264 files that hold the frames of several episodes, one behind the other."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.video.frame import PictureType

from lac_vla.datasets.layout import AGAIN, VIDEO_FILE_MB, VIDEO_PATH, DatasetError, next_file
from lac_vla.files import reading, sync
from lac_vla.types import UInt8Image

OPTIONS = {"crf": "16", "g": "5", "bf": "0", "preset": "veryfast", "forced-idr": "1"}
"""x264's. Quality 16 is visually lossless; a key frame among five makes random access cheap."""
BT601, LIMITED = 5, 1
"""Colour matrix and range of our videos, as FFmpeg numbers them; OpenCV converts to and from these."""
_READS_AS_BT601 = (2, 5, 6)
"""Matrices that mean BT.601, or nothing is said."""


@dataclass
class VideoWriter:
    """Writes the episodes of one camera into as few files as the size limit allows.

    Every episode begins with a key frame, so that it can be read without those before it. There are no
    B-frames: frames come out of the decoder in the order in which they went in.

    Attributes:
        root: The dataset's folder.
        key: The camera's feature, e.g. ``observation.images.agentview``.
        fps: Frames per second.
        height: Height of the images, even.
        width: Width of the images, even.
        limit_mb: A new file begins before one grows beyond this.
        place: Chunk and file to begin with.
        threads: Threads of the encoder; 0 leaves their number to x264.
    """

    root: Path
    key: str
    fps: int
    height: int
    width: int
    _: KW_ONLY
    limit_mb: float = VIDEO_FILE_MB
    place: tuple[int, int] = (0, 0)
    threads: int = 0

    def __post_init__(self) -> None:
        self._container: Any = None
        self._stream: Any = None
        self._frames = self._bytes = 0

    def add(self, images: UInt8Image) -> dict[str, int | float]:
        """Append an episode.

        Args:
            images: uint8, (T, H, W, 3), of the size given at the start.

        Returns:
            ``chunk_index``, ``file_index``; ``from_timestamp``, ``to_timestamp`` (seconds within the file).
        """
        if (
            self._container is not None
            and self._bytes * (1 + len(images) / max(1, self._frames)) > self.limit_mb * 2**20
        ):
            self.close()
            self.place = next_file(*self.place)
        if self._container is None:
            self._open()
        first = self._frames
        for offset, image in enumerate(images):
            planes = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2YUV_I420)
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = first + offset
            frame.time_base = Fraction(1, self.fps)
            frame.pict_type = PictureType.I if offset == 0 else PictureType.NONE
            self._mux(frame)
        self._frames += len(images)
        return {
            "chunk_index": self.place[0],
            "file_index": self.place[1],
            "from_timestamp": first / self.fps,
            "to_timestamp": self._frames / self.fps,
        }

    def close(self) -> None:
        """Finish the file that is being written."""
        if self._container is None:
            return
        self._mux(None)
        self._container.close()
        self._container, self._stream = None, None
        sync(self._path)

    def _open(self) -> None:
        chunk, file = self.place
        self._path = self.root / VIDEO_PATH.format(video_key=self.key, chunk_index=chunk, file_index=file)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._path), "w")
        stream = self._container.add_stream("libx264", rate=self.fps, options=OPTIONS)
        stream.height, stream.width = self.height, self.width
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = self.threads
        stream.codec_context.colorspace = BT601
        stream.codec_context.color_range = LIMITED
        self._stream = stream
        self._frames = self._bytes = 0

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._bytes += packet.size
            self._container.mux(packet)


def read_frames(
    path: Path, times: npt.NDArray[np.float64], fps: float, *, episode: int = 0, first: int = 0
) -> UInt8Image:
    """Decode the frames that are nearest to some times.

    Args:
        path: The file.
        times: Seconds within the file, growing, (T,).
        fps: Frames per second, where the file does not say how many it has.
        episode: The episode's number, for messages.
        first: Number of the first frame within the episode.

    Returns:
        uint8, (T, H, W, 3), RGB.

    Raises:
        DatasetError: If the file is missing or damaged, or has no frame within half a frame of one of the times.
    """
    images: list[UInt8Image] = []
    with reading(path, AGAIN, DatasetError), av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"
        base = stream.time_base or Fraction(1, round(fps))
        tolerance = 0.51 / float(stream.average_rate or stream.guessed_rate or fps)

        def take(now: float, frame: Any) -> None:
            wanted = times[len(images)]
            if abs(now - wanted) > tolerance:
                raise DatasetError(
                    f"{path}: episode {episode}, frame {first + len(images)} is at {wanted:.3f} s, the nearest frame "
                    f"of the video at {now:.3f} s: it is cut short, or belongs to another dataset; {AGAIN}"
                )
            images.append(_rgb(frame))

        container.seek(max(0, int((times[0] - tolerance) / base)), stream=stream)
        before: tuple[float, Any] | None = None
        for frame in container.decode(stream):
            if frame.pts is None:
                continue
            now = float(frame.pts * base)
            while len(images) < len(times) and now >= times[len(images)]:
                wanted = times[len(images)]
                take(*(before if before is not None and wanted - before[0] < now - wanted else (now, frame)))
            before = now, frame
            if len(images) == len(times):
                break
        while len(images) < len(times):
            if before is None:
                raise ValueError("it holds no frames")
            take(*before)
    return np.stack(images)


def _rgb(frame: Any) -> UInt8Image:
    """Convert a frame to uint8, (H, W, 3). OpenCV is many times faster than PyAV, and does not darken the image."""
    plain = frame.format.name == "yuv420p" and int(frame.color_range) != 2 and not (frame.height | frame.width) % 2
    if plain and int(frame.colorspace) in _READS_AS_BT601:
        return np.asarray(cv2.cvtColor(frame.to_ndarray(), cv2.COLOR_YUV2RGB_I420), dtype=np.uint8)
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
