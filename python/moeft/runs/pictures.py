"""Pictures of results, which nothing waits for."""

from __future__ import annotations

from collections.abc import Callable

from moeft.errors import MissingExtraError


def draw_picture(picture: Callable[[], object], show: Callable[[str], None]) -> None:
    """Draw, or say why there is no picture: no reason to fail what may have taken hours."""
    try:
        picture()
    except MissingExtraError as error:
        show(f"no picture: {error}")
