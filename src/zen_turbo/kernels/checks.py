"""What all wrappers check with, because the native side trusts its arguments, and how they call it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch

from zen_turbo import native

DTYPES = {torch.bfloat16: 0, torch.float32: 1}  # as csrc/kernels.h numbers them
P = ParamSpec("P")


def need(ok: bool, message: str) -> None:
    """Raises ValueError unless ``ok``."""
    if not ok:
        raise ValueError(message)


def calling(name: str, prepare: Callable[P, native.Args]) -> Callable[P, None]:
    """The native function whose arguments ``prepare`` checks and gives. These hold addresses: whoever keeps them keeps the tensors too."""

    @functools.wraps(prepare)
    def call(*args: P.args, **settings: P.kwargs) -> None:
        native.call(name, prepare(*args, **settings))

    return call
