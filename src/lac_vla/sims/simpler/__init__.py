"""SIMPLER: policies for real robots, judged in simulation (Li et al., 2024, arXiv 2405.05941).

:mod:`protocol` is the benchmark as data, in the words of :mod:`episode`; :mod:`benchmark` is what an evaluation plays;
:mod:`env` is one task, on a :mod:`backend`: :mod:`ms2`, the original in a process of its own, or :mod:`ms3`, the port
to ManiSkill3 in this process; :mod:`actions` turns what a VLA answers into what they take. :mod:`published_table` makes
the published tables of episodes, and says when a run may not be called by their name; :mod:`assets` says what is
missing on this machine.
"""
