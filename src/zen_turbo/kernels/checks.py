"""What all wrappers check with: the native side trusts its arguments."""

from __future__ import annotations

import torch

DTYPES = {torch.bfloat16: 0, torch.float32: 1}  # as csrc/kernels.h numbers them


def need(ok: bool, message: str) -> None:
    """Raises ValueError unless ``ok``."""
    if not ok:
        raise ValueError(message)
