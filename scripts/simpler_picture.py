"""Draw docs/images/simpler.jpg: one episode of the scripted expert per WidowX task, in ManiSkill3's port.

It takes one word, ManiSkill3's folder; by default MS_ASSET_DIR of the environment.
"""

import sys
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np

from lac_vla.sims.simpler.benchmark import Simpler
from lac_vla.sims.simpler.demonstration import demonstrate

OUT = Path(__file__).parents[1] / "docs" / "images" / "simpler.jpg"
COLUMNS, WIDTH, HEIGHT = 6, 200, 150


def main() -> None:
    """Play the episodes, and put six pictures of each in a row."""
    benchmark = Simpler("simpler-widowx", "ms3", assets=Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    rows = []
    for task in benchmark.task_ids():
        with closing(benchmark.make_env(task)) as env:
            demo = demonstrate(env, env.episodes[0], np.random.default_rng(0))
        print(f"{demo.instruction}: {'solved' if demo.solved else 'not solved'}, {len(demo)} steps")
        shown = [
            demo.frames[k].images[benchmark.cameras[0]] for k in np.linspace(0, len(demo) - 1, COLUMNS).astype(int)
        ]
        rows.append(np.hstack([cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for image in shown]))
    cv2.imwrite(str(OUT), np.vstack(rows)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])


if __name__ == "__main__":
    main()
