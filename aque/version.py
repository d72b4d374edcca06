"""The version, in one place: the package metadata and `aque --version` both read it."""

__version__ = "0.1.0"
