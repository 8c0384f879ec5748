"""A run's folder, read for the report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lac_vla.errors import InputError
from lac_vla.files import read_object
from lac_vla.provenance import busy
from lac_vla.results.records import EpisodeRecord, Trial, read_episodes
from lac_vla.results.summary import Summary, summarize


@dataclass(frozen=True)
class Run:
    """One evaluation on disk; the metadata (command, versions, hardware, model, …) are those of ``summary.json``."""

    folder: Path
    metadata: dict[str, Any]
    episodes: list[EpisodeRecord]
    summary: Summary

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a run's folder; an :class:`InputError` says that it is none, or has no finished episode."""
        folder = Path(folder)
        if not os.path.isdir(folder):
            raise InputError(f"there is no folder {folder}: give the folder of a run of 'lac eval'")
        path = folder / "summary.json"
        metadata = read_object(path, "resume the run (lac eval), it writes it again") if path.exists() else {}
        episodes = read_episodes(folder / "episodes.jsonl")
        return cls(folder, metadata, episodes, summarize(episodes))

    @property
    def specs(self) -> dict[str, str]:
        """Map a method to its policy, as on a command line, where the run says it."""
        methods = self.metadata.get("methods")
        described = methods.items() if isinstance(methods, dict) else ()
        found = {name: about.get("policy") if isinstance(about, dict) else about for name, about in described}
        return {str(name): str(policy) for name, policy in found.items() if policy}

    @property
    def rendering(self) -> str:
        """Name the simulator's rendering mode; empty if the run does not say."""
        simulator = self.metadata.get("simulator")
        return str(simulator.get("rendering", "")) if isinstance(simulator, dict) else ""

    @property
    def notes(self) -> list[str]:
        """List what holds for the whole run, as it says itself."""
        notes = self.metadata.get("notes")
        return [str(note) for note in notes] if isinstance(notes, list) else []

    @property
    def busy(self) -> str | None:
        """Say that the machine had other work, see :func:`lac_vla.provenance.busy`."""
        hardware, load = self.metadata.get("hardware"), self.metadata.get("load")
        cores = hardware.get("cores") if isinstance(hardware, dict) else None
        if not isinstance(load, float) or not isinstance(cores, int) or not 0 < cores < 2**31:
            return None
        return busy(load, cores)

    def file(self, name: str | None) -> Path | None:
        """Find a file that a record names; ``None`` if it is not there, or lies outside the folder, links followed."""
        try:
            path, root = (self.folder / (name or "")).resolve(), self.folder.resolve()
            return path if os.path.isfile(path) and path.is_relative_to(root) else None
        except (OSError, RuntimeError, ValueError):  # links in a circle, names that no file can have
            return None

    def recorded(self) -> list[list[EpisodeRecord]]:
        """Group the episodes with videos by trial, each group with its episodes in the order of the methods.

        Those on which methods disagree come first, then one of each task, then the rest.
        """
        order = {row.method: index for index, row in enumerate(self.summary.methods)}
        trials: dict[Trial, list[EpisodeRecord]] = {}
        for episode in self.episodes:
            if self.file(episode.video) is not None:
                trials.setdefault(episode.trial, []).append(episode)
        groups = [sorted(group, key=lambda e: order[e.method]) for _, group in sorted(trials.items())]
        first = {group[0].task: group[0].trial for group in reversed(groups)}

        def place(group: list[EpisodeRecord]) -> tuple[bool, bool]:
            return len({e.success for e in group}) == 1, first[group[0].task] != group[0].trial

        return sorted(groups, key=place)
