"""A caching policy of one's own: the tokens that have waited longest are recomputed, whatever they show."""

from dataclasses import dataclass

import numpy as np

from lac_vla import CachedVLA, CachePolicy, Decision, Frame, PolicyInput, load_vla


@dataclass(frozen=True)
class RoundRobin(CachePolicy):
    """Reuse the youngest slots.

    Attributes:
        ratio: Share of the visual tokens reused, in [0, 1].
    """

    ratio: float = 0.5

    def decide(self, inputs: PolicyInput) -> Decision:
        """Reuse the tokens of the lowest age; of equally old ones, those that come first."""
        youngest = np.argsort(inputs.age, kind="stable")[: round(self.ratio * inputs.age.size)]
        cached = np.zeros(inputs.age.size, dtype=np.bool_)
        cached[youngest] = True
        return Decision.reuse(cached, inputs.n_layers, nominal_ratio=self.ratio)


if __name__ == "__main__":
    robot = CachedVLA(load_vla("mini"), RoundRobin(ratio=0.75)).session()
    camera = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    for _ in range(6):
        robot.act(Frame({"agentview": camera, "wrist": camera}, "pick up the bowl", np.zeros(8, np.float32)))
        print(f"{robot.last_info.ratio:.0%} reused, oldest slot {robot.last_info.oldest_age} frames")
