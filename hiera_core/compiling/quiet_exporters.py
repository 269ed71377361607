"""Exporters and compilers without their warnings and log lines."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Hide the warnings and log lines of the exporters. What they write is
    verified or used later."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "torch.utils.cpp_extension", "torch._inductor")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
