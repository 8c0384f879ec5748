"""``lac serve`` and ``lac view``. Without postponed annotations: tyro reads them."""

from typing import Annotated

import tyro

from lac_vla.cli.marks import FLAT
from lac_vla.cli.output import console
from lac_vla.serving.config import ServeConfig


def serve(config: Annotated[ServeConfig, FLAT]) -> None:
    """Serve a VLA with its policy to robots that speak openpi's websocket protocol.

    Args:
        config: What to serve, and how.
    """
    from lac_vla.serving.config import serve as run

    run(config)


def view(url: tyro.conf.Positional[str] = "ws://127.0.0.1:8000") -> None:
    """Open the live page of a server that runs with `lac serve --view`: what every robot's session reuses, and why.

    Args:
        url: Where the server listens, as robots are told: `ws://HOST:PORT` or `wss://HOST:PORT`.
    """
    from lac_vla.serving.browse import open_page

    console.print(open_page(url), soft_wrap=True)
