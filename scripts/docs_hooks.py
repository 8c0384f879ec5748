"""Shows roles in docstrings (``:class:`…```) as code on the site: an extension of griffe, which mkdocstrings uses."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|obj):`~?([^`]+)`")


class Roles(Extension):
    """Takes the role away and leaves the name."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"``\1``", obj.docstring.value)
