"""``moeft merge``: the ``moeft-merge`` command, with its own parser, and what only Python can do behind it."""

import json
from pathlib import Path

import typer

# Every word goes to the parser of the Rust command, --help included.
FORWARD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def merge(context: typer.Context) -> None:
    """Merge models and adapters into a full checkpoint, in bounded memory."""
    from moeft import _core

    code, verify = _core.merge_command(context.args)
    if verify is not None:
        code = _verify(*verify)
    raise typer.Exit(code)


def _verify(recipe: Path, out: Path, as_json: bool) -> int:
    from moeft.runs.verified_merge import run

    notes: list[str] = []
    proofs = run(Path(recipe), Path(out), notes.append)
    if as_json:
        print(json.dumps({"proofs": [proof.to_json() for proof in proofs], "notes": notes}))
    else:
        print("\n".join([*notes, *map(str, proofs)]))
    return 0 if all(proof.ok for proof in proofs) else 1
