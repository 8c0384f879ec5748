"""``lac replay``. Without postponed annotations: tyro reads it."""

from typing import Annotated

from lac_vla.cli.marks import FLAT
from lac_vla.cli.output import console, show
from lac_vla.training.replay_config import ReplayConfig


def replay(config: Annotated[ReplayConfig, FLAT]) -> None:
    """Whole sessions of several policies over the same recorded frames, each on its own cache, compared frame by frame.

    No simulator is needed: what a policy reuses, and how far its answers are from dense's, is told for every frame of
    held-out demonstrations; against two baselines at equal cost, against one as it is, by bootstrap over the episodes;
    and around gripper events against free motion, by a test, where actions are 7 values, the gripper last. Scene cuts
    are not made. Whether the robot succeeds is another question: `lac eval`.

    Run it again to go on.

    Args:
        config: What to replay.
    """
    from lac_vla.drawing.replay_chart import middle, replay_chart
    from lac_vla.files import write_whole
    from lac_vla.results.replay_tables import replay_tables
    from lac_vla.training.replay import FIGURES
    from lac_vla.training.replay import replay as run

    found = run(config)
    for table in replay_tables(found.replay, found.notes):
        show(table.to_terminal())
    for name, row in found.replay.methods.items():
        if (warning := row.adaptivity.warning) is not None:
            console.print(f"warning: {name}: {warning}", soft_wrap=True)
    adaptive = [name for name, row in found.replay.methods.items() if row.adaptivity.adaptive]
    shown = middle(found.episodes, (*adaptive, *found.replay.methods)[0])
    picture = config.out / "replay.svg"
    write_whole(picture, replay_chart(shown, found.replay.tokens, config.contact, adaptive))
    console.print(f"figures: {config.out / FIGURES}\npicture: {picture}")
