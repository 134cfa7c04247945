"""The command line. Commands parse, call and print; no heavy import happens here."""

from qwenq.cli.app import main

__all__ = ["main"]
