"""The ``moeft`` command. One file per subcommand: parse, call, print.

Typer needs every signature to print ``--help``, so the files are imported here; what they call is imported inside the
command, which keeps torch out until a command needs it.
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from moeft import __version__
from moeft.cli.adapter import app as adapter
from moeft.cli.data import app as data
from moeft.cli.demo import demo
from moeft.cli.dpo import dpo
from moeft.cli.evaluate import evaluate
from moeft.cli.export import app as export
from moeft.cli.fisher import fisher
from moeft.cli.hard import app as hard
from moeft.cli.imatrix import imatrix
from moeft.cli.layout import layout
from moeft.cli.merge import FORWARD, merge
from moeft.cli.plan import plan
from moeft.cli.quantize import quantize
from moeft.cli.report import report
from moeft.cli.run import run
from moeft.cli.serve import serve
from moeft.cli.sft import sft
from moeft.cli.subspace import subspace
from moeft.errors import MoeftError

app = typer.Typer(name="moeft", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for _command in (plan, quantize, sft, dpo, evaluate, fisher, subspace, imatrix, layout, serve, report, run, demo):
    app.command()(_command)
app.command(context_settings=FORWARD)(merge)
app.add_typer(adapter)
app.add_typer(data)
app.add_typer(export)
app.add_typer(hard)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"moeft {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune Mixture-of-Experts language models on the hardware you have.

    An error is printed without its traceback; --debug, anywhere on the line, shows it.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 error, 2 wrong usage, 130 interrupted; `moeft merge` has more.

    Args:
        arguments: Words after ``moeft``; those of the process if None.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        app([word for word in words if word != "--debug"], prog_name="moeft")
    except SystemExit as stop:
        if stop.code == 130:  # Typer's answer to an interrupt, without a word.
            print("moeft: interrupted", file=sys.stderr)
        raise
    except (MoeftError, OSError, ValueError) as error:
        if debug:
            raise
        print(f"moeft: error: {_message(error)}", file=sys.stderr)
        sys.exit(1)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        # Errors of the Rust core name the file themselves.
        return error.strerror if str(error.filename) in error.strerror else f"{error.filename}: {error.strerror}"
    return str(error)
