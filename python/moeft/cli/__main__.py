"""``python -m moeft.cli``: the same as the ``moeft`` command."""

from moeft.cli import main

main()
