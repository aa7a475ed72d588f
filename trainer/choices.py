"""The names that options and artifacts share; without torch, because --help needs them."""

from typing import Literal

Arch = Literal["wide_resnet50_2", "resnet18", "resnet50", "mobilenet_v2"]
Loss = Literal["direct", "indirect", "sum", "cross_entropy"]
Matching = Literal["nearest", "one-to-one"]
Components = Literal["all", "visible"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["fp32", "bf16"]
