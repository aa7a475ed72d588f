"""Builds pseudo-defect datasets: normal photographs in, shards with parameters out."""

from builder.errors import BuilderError

__all__ = ["BuilderError", "__version__"]

__version__ = "0.1.0"
