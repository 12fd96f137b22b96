"""Rows in other languages than those wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeft.config.filters import Language
from moeft.data.filters.filter import missing_extra, text_of

if TYPE_CHECKING:
    from moeft.data.rows import Row

JUDGED_CHARACTERS = 1000


class LanguageFilter:
    """Leaves out rows whose users and assistants write in another language, as py3langid tells it.

    The answer is a naive Bayes classifier's on the first 1,000 characters: the same every time, and often wrong for
    a few words or for code, which is why short rows are kept.

    Raises:
        MissingExtraError: If py3langid is not installed.
        ValueError: If a code is none of its languages.
    """

    name = "language"

    def __init__(self, settings: Language) -> None:
        try:
            import py3langid
        except ImportError as error:
            raise missing_extra(self.name, "py3langid") from error
        self._classify = py3langid.classify
        self._settings = settings
        known = {language for language, _ in py3langid.rank("")}
        if unknown := sorted(set(settings.keep) - known):
            raise ValueError(
                f"filters.language.keep holds {unknown[0]!r}, expected codes such as en; known are "
                f"{', '.join(sorted(known))}"
            )

    def reason(self, row: Row, place: str) -> str | None:
        """Which language a row is in, if none of those wanted."""
        text = text_of(row, ("user", "assistant"))[:JUDGED_CHARACTERS]
        if len(text) < self._settings.min_characters:
            return None
        language, _ = self._classify(text)
        return None if language in self._settings.keep else f"is in language {language!r}"
