"""Console entry point of rotmole: imports nothing heavy, so that help and version answer at once."""

__version__ = "0.1.0"
