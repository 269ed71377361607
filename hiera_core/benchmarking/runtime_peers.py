"""Peers that run an exported model on the CPU: OpenVINO and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import zoo
from ..compiling.quiet_exporters import quiet_exporters
from ..models.factory import model_class
from .job import Mode
from .not_offered import NotOffered

OPSET = 18
Run = Callable[[np.ndarray], Any]


class ExportedModel(nn.Module):
    """Our model, exported to ONNX for the shape of its first input and run by another library.

    Args:
        entry: The model.
        prepare: Function that takes the content of an ONNX file and the dtype, and returns a
            function of the input.
    """

    def __init__(self, entry: zoo.ModelEntry, prepare: Callable[[bytes, torch.dtype], Run]) -> None:
        super().__init__()
        self.model: nn.Module | None = model_class(entry)(**entry.config)
        self._prepare = prepare
        self._run: Run | None = None

    def forward(self, x: torch.Tensor) -> Any:
        """[b, 3, *size] -> what the library returns"""
        if self._run is None:
            self._run = self._prepare(self._exported(x), x.dtype)
            self.model = None  # the library has weights of its own
        return self._run(x.float().numpy())

    def _exported(self, x: torch.Tensor) -> bytes:
        if not x.is_cpu:
            raise NotOffered("OpenVINO and ONNX Runtime are measured on the CPU only")
        assert self.model is not None
        with torch.inference_mode(False), torch.no_grad(), quiet_exporters():
            example = torch.zeros(x.shape)
            program = torch.onnx.export(
                self.model.float().eval(), (example,), opset_version=OPSET, dynamo=True,
                verbose=False,
            )  # fmt: skip
            assert program is not None
            content: bytes = program.model_proto.SerializeToString()
        return content


def build_openvino(entry: zoo.ModelEntry, mode: Mode) -> nn.Module:
    """Return the model for OpenVINO."""
    _check(entry, mode, "OpenVINO")
    return ExportedModel(entry, _openvino)


def build_onnxruntime(entry: zoo.ModelEntry, mode: Mode) -> nn.Module:
    """Return the model for ONNX Runtime."""
    _check(entry, mode, "ONNX Runtime")
    return ExportedModel(entry, _onnxruntime)


def _check(entry: zoo.ModelEntry, mode: Mode, name: str) -> None:
    """Check that a library can be measured.

    Raises:
        NotOffered: The model is not exported without further inputs, or gradients are asked for.
    """
    if mode != "infer":
        raise NotOffered(f"{name} computes no gradients")
    if entry.autoencoder or entry.family == "hieradet":
        raise NotOffered(f"{name} is measured with classifiers only")


def _openvino(content: bytes, dtype: torch.dtype) -> Run:
    import openvino

    core = openvino.Core()
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    options = {
        "INFERENCE_PRECISION_HINT": names[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(content), "CPU", options)
    request = compiled.create_infer_request()
    return lambda x: request.infer([x])


def _onnxruntime(content: bytes, dtype: torch.dtype) -> Run:
    import onnxruntime

    if dtype is not torch.float32:
        raise NotOffered("ONNX Runtime is measured in fp32: use --against onnxruntime:fp32")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})
