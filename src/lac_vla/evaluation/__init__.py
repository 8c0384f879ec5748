"""Closed-loop evaluation: rollouts, their statistics and their tables."""
