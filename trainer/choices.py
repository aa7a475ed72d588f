"""The names that options and artifacts share; without torch, because --help needs them."""

from typing import Literal

Arch = Literal["wide_resnet50_2", "resnet18", "resnet50", "mobilenet_v2"]
Loss = Literal["direct", "indirect", "cross_entropy"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["fp32", "bf16"]
