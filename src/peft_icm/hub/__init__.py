"""The Hugging Face Hub: transport (`files`) and cards (`cards`)."""

from .files import resolve

__all__ = ["resolve"]
