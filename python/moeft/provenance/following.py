"""The run folder as processes other than the first of a run see it."""

from typing import Any

from moeft.provenance.folder import RunFolder


class FollowedRun(RunFolder):
    """Reads what the first process of the run writes, and writes nothing itself."""

    def event(self, kind: str, **fields: Any) -> None:
        """Leave it to the first process."""

    def write_json(self, name: str, value: Any) -> Any:
        """Leave it to the first process."""
        return self.path / name

    def _update(self, **fields: Any) -> None:
        self.record.update(fields)
