"""Runs PaDiM with several pre-trained backbones on inspection photographs and compares them."""

from evaluator.errors import EvaluatorError

__all__ = ["EvaluatorError", "__version__"]

__version__ = "0.1.0"
