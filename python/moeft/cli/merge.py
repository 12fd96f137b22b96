"""``moeft merge``: the ``moeft-merge`` command, with its own parser."""

import typer

# Every word goes to the parser of the Rust command, --help included.
FORWARD = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def merge(context: typer.Context) -> None:
    """Merge models and adapters into a full checkpoint, in bounded memory."""
    from moeft import _core

    raise typer.Exit(_core.merge_command(context.args))
