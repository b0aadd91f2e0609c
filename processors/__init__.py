"""A model's processor on PIL and NumPy: the same one for runner, conversion, calibration and eager reference."""

from .opening import Processor, open_processor

__all__ = ["Processor", "open_processor"]
