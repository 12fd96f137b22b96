"""The run folder: what a command was asked, what happened, what came out.

``run.json`` says what ran and is compared at a second start, ``events.jsonl`` grows while it runs, results such as
``metrics.json`` are written when they are known. Every event has ``time`` (UTC), ``kind`` and the fields of its kind:

================  ==================================================================================
``start``         ``attempt``, from 1; ``changed``: versions and hardware that differ since the last start
``stage``         ``name``, ``status``, ``seconds``
``train_log``     ``step``, ``loss``, ``learning_rate``, ``tokens_per_second``, ``peak_bytes``, ``grad_norm``, and of a
                  model with experts ``load_imbalance``, ``load_entropy``, ``router_entropy``, ``idle_experts``
``eval``          ``step``, ``loss`` on held-out rows
``checkpoint``    ``step``, ``path``
``skipped_step``  ``step``, ``reason``, ``module``, ``detail``, ``places`` in the micro-batch, ``rows`` of the training
                  set
``frozen_base``   ``sha256``, ``bytes``, ``seconds``, ``changed``: frozen tensors that training altered
``gate``          ``step``, ``verdict`` (``base``, ``passed`` or the action), ``breaches``, ``seconds``, ``readings``:
                  ``name``, ``value``, ``low``, ``high``, ``num``, ``better``
``protection``    ``mode``, ``parameters`` that are protected, ``bytes`` of their bases
``reference``     ``cached``, ``computed``, ``verified``: sequences, two for each preference pair
``stopped``       ``step``, ``reason``: a rule that ended training early
``round``         ``number``, ``accuracy`` on held-out requests, ``gate_loss``
``router_drift``  ``tokens`` compared before and after training, mean ``agreement``, ``same_first`` and ``load_shift``
``failed``        ``error``
================  ==================================================================================
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from moeft.errors import RunFolderError
from moeft.provenance import files
from moeft.provenance.comparison import asked, differences, run_differences
from moeft.provenance.environment import describe_environment


class RunFolder:
    """One run on disk. As a context manager it marks the run finished, or failed when an exception passes.

    A run that was paused stays so.

    Attributes:
        path: The folder.
        record: Content of ``run.json``.
    """

    def __init__(self, path: Path, record: dict[str, Any], lock: IO[bytes] | None = None):
        self.path = path
        self.record = record
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: str | Path,
        command: str,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, Path],
        seed: int | None = None,
        processes: int = 1,
    ) -> Self:
        """Start a run, or continue the one that a folder holds.

        A run continues if its recipe, seed, inputs and number of processes are the same and it is not finished; one
        that failed in its first stage has nothing to continue and starts anew with others. Other package versions or
        another machine do not stop it; they are listed in ``changed`` of its ``start`` event.

        Args:
            path: Folder, made if missing.
            command: As the user knows it, such as ``moeft sft``.
            recipe: Resolved recipe in plain JSON types.
            inputs: Files and folders that the result depends on, by a name for messages.
            seed: Seed of everything random, if there is one.
            processes: How many share the run: batches, the order of rows and optimiser state depend on it.

        Raises:
            FileNotFoundError: If an input is missing.
            RunFolderError: If the folder holds other files, another recipe or other inputs, a finished run, or one
                that another process is running.
        """
        path = Path(path).absolute()
        wanted = asked(command, recipe, inputs, seed, processes)
        _require_free(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            if (path / "run.json").exists():
                return cls._continue(path, wanted, lock)
            record = {**wanted, **describe_environment(), "started_at": _now(), "attempts": 1, "status": "running"}
            files.write_json(path / "run.json", record)
            run = cls(path, record, lock)
            run.event("start", attempt=1, changed=[])
            return run
        except BaseException:
            lock.close()
            raise

    @classmethod
    def check(
        cls,
        path: str | Path,
        command: str,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, Path],
        seed: int | None = None,
        processes: int = 1,
    ) -> None:
        """Refuse what :meth:`create` would refuse, and leave everything as it is; arguments and errors are the same."""
        path = Path(path).absolute()
        wanted = asked(command, recipe, inputs, seed, processes)
        _require_free(path)
        if (path / "run.json").exists():
            cls.open(path)._require_same(wanted)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run for reading, whatever its state.

        Raises:
            RunFolderError: If the folder holds no run, or its ``run.json`` is damaged.
        """
        path = Path(path).absolute()
        if not (path / "run.json").is_file():
            raise RunFolderError(f"{path} is no run folder: it has no run.json; give the `output` of a recipe")
        record = files.read_json(path / "run.json")
        if not isinstance(record, dict) or not {"command", "recipe", "inputs", "status"} <= record.keys():
            raise RunFolderError(f"{path / 'run.json'} lacks keys that every run has; was it written by moeft?")
        return cls(path, record)

    @classmethod
    def _continue(cls, path: Path, wanted: dict[str, Any], lock: IO[bytes]) -> Self:
        run = cls.open(path)
        run._lock = lock
        run._require_same(wanted)
        files.drop_torn_line(path / "events.jsonl")
        if run_differences(run.record, wanted):
            (path / "metrics.json").unlink(missing_ok=True)
            run._update(**wanted)
        environment = describe_environment()
        before = {key: run.record.get(key) for key in environment}
        run._update(**environment, attempts=run.record["attempts"] + 1, status="running")
        run.event("start", attempt=run.record["attempts"], changed=differences(before, environment))
        return run

    @property
    def _came_to_nothing(self) -> bool:
        """Whether it failed in its first stage, as on bad rows: what it was asked may change then."""
        stages = [event["status"] for event in self.events("stage")]
        return self.status == "failed" and bool(stages) and "finished" not in stages

    def _require_same(self, wanted: Mapping[str, Any]) -> None:
        changed = run_differences(self.record, wanted)
        if changed and not self._came_to_nothing:
            what = f"{self.path} holds a run of something else; choose another output, or go back to:"
            raise RunFolderError("\n  ".join([what, *changed]))
        if self.status == "finished":
            when = self.record["finished_at"]
            raise RunFolderError(f"{self.path} holds this run, finished at {when}; nothing is left to do")

    @property
    def status(self) -> str:
        """``running`` (also after a kill), ``paused``, ``failed`` or ``finished``."""
        return self.record["status"]

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event; it survives the process being killed right after."""
        files.append_line(self.path / "events.jsonl", {"time": _now(), "kind": kind, **fields})

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Events so far, oldest first, of one kind or all. A torn last line is left out."""
        events = files.read_lines(self.path / "events.jsonl")
        return [event for event in events if kind is None or event.get("kind") == kind]

    def write_json(self, name: str, value: Any) -> Path:
        """Write a result such as ``metrics.json``, replacing it atomically."""
        files.write_json(self.path / name, value)
        return self.path / name

    def read_json(self, name: str) -> Any:
        """Read a result, or None if it was not written yet."""
        return files.read_json(self.path / name) if (self.path / name).exists() else None

    def finish(self) -> None:
        """Mark the run finished and let other processes have the folder."""
        self._update(status="finished", finished_at=_now())
        self._unlock()

    def pause(self) -> None:
        """Mark the run as one that the next start goes on with, and let other processes have the folder."""
        self._update(status="paused")
        self._unlock()

    def fail(self, error: BaseException) -> None:
        """Mark the run failed, with the error as an event, and let other processes have the folder."""
        self.event("failed", error=f"{type(error).__name__}: {error}")
        self._update(status="failed")
        self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        elif self.status != "paused":
            self.finish()

    def _update(self, **fields: Any) -> None:
        self.record.update(fields)
        files.write_json(self.path / "run.json", self.record)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _lock(path: Path) -> IO[bytes]:
    """Hold the folder for this process; the system lets go of it when the process ends, however it ends."""
    file = open(path / ".lock", "ab")  # noqa: SIM115  (open for as long as the run)
    try:
        import fcntl
    except ImportError:  # Windows, where two starts in one folder are not noticed.
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RunFolderError(f"another process is running in {path}; wait for it, or choose another output") from error
    return file


def _require_free(path: Path) -> None:
    if path.is_dir() and not (path / "run.json").exists() and _visible_names(path):
        names = ", ".join(_visible_names(path)[:3])
        raise RunFolderError(f"{path} is no run folder and not empty ({names}); choose another output")


def _visible_names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
