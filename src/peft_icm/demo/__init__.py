"""The demo of the bundled generators."""

from .run import run_demo

__all__ = ["run_demo"]
