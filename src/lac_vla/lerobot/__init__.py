"""A policy of LeRobot's, called ``lac_vla``: a VLA with its caching policy. Modules are named as LeRobot seeks them.

Nothing here is imported by the rest of the library, and only :mod:`lac_vla.lerobot.bridge` does without LeRobot.
"""
