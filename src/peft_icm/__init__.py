"""peft_icm: a sentence in, a native PEFT adapter out."""

__version__ = "0.1.0"
