"""The version of this package, for whoever asks at run time."""

__version__ = "0.1.0"
