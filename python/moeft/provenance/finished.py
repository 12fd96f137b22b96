"""Whether a folder holds what a run was to leave."""

from pathlib import Path

from moeft.provenance.folder import RunFolder


def is_finished(path: Path) -> bool:
    """Whether a folder holds a run that came to its end; one that is not there, or holds no run, does not.

    Raises:
        RunFolderError: If its ``run.json`` is damaged.
    """
    return (path / "run.json").is_file() and RunFolder.open(path).status == "finished"
