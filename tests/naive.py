"""Slow, obvious versions of what the packages compute fast: float64, one pixel or one position at a time."""

from __future__ import annotations

import numpy as np
