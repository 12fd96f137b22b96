"""Where a result came from: the run folder, the environment it ran in, and fingerprints of what it read."""

from moeft.provenance.fingerprint import fingerprint
from moeft.provenance.finished import is_finished
from moeft.provenance.folder import RunFolder
from moeft.provenance.following import FollowedRun

__all__ = ["FollowedRun", "RunFolder", "fingerprint", "is_finished"]
