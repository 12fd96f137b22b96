"""Native core of moeft. Private: use the public functions of the package."""

__version__: str
