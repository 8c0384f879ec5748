"""Make README's picture from a video: ``python scripts/readme_picture.py VIDEO.mp4 docs/images/overlay.jpg``."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2

from lac_vla.drawing.picture import filmstrip
from lac_vla.drawing.video import sample_frames


def main(video: str, out: str) -> None:
    """Write four frames of a video, side by side."""
    strip = filmstrip(sample_frames(video, 4), 4)
    width = 1600
    strip = cv2.resize(strip, (width, round(strip.shape[0] * width / strip.shape[1])), interpolation=cv2.INTER_AREA)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(out, strip[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88]):
        raise SystemExit(f"cannot write {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
