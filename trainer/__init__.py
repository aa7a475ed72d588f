"""Pre-trains a CNN to tell the parameters of painted pseudo-defects, from the builder's shards."""

from trainer.errors import TrainerError

__all__ = ["TrainerError", "__version__"]

__version__ = "0.1.0"
