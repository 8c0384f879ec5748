"""A LeRobot policy, ``lac_vla``: a VLA with its caching policy. The modules have the names that LeRobot looks for.

Nothing here is imported by the rest of the library, and only :mod:`lac_vla.lerobot.bridge` does without LeRobot.
"""
