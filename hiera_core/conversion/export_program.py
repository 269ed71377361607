"""Export models as programs that run without this package: ONNX, torch.export and AOTInductor.

A program takes `image` or `video`, normalised float32 [batch, chans, *size]; that of an autoencoder
also takes `keep`, the numbers of the mask units that it sees. program.py says what it returns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..compiling.aot_package import NEEDS_NO_COMPILER, compile_package, has_compiler
from ..compiling.quiet_exporters import quiet_exporters
from ..device import DTYPES
from ..errors import UsageError
from ..models.encoder import Encoder
from ..models.hiera import HieraEncoder
from ..models.sam2.hieradet import HieraDet
from ..weights.files import open_deferring_errors
from .formats import FORMATS
from .graph_layout import prepare_for_export
from .plan import ConversionPlan
from .program import (
    Program,
    check_outputs,
    draw_keep,
    input_names,
    largest_batch,
    takes_units,
    tensor_names,
)

OPSET = 18
UNCHECKED = (
    "the package does not check its inputs: others than input_shapes names give wrong numbers or a "
    "crash; with AOTI_RUNTIME_CHECK_INPUTS=1 in its environment it refuses them"
)
PROTOBUF_LIMIT = 2 << 30  # bytes; larger weights go to a second file next to the .onnx file


def prepare_program(
    plan: ConversionPlan, name: str, outputs: Sequence[str], batch_size: int | None
) -> None:
    """Choose and check what the program of a plan takes and returns.

    Args:
        plan: The model to write.
        name: Name of the format.
        outputs: See `program.check_outputs`.
        batch_size: Size of every batch, for formats with a fixed batch.

    Raises:
        UsageError: The model does not have an output, the input or the batch has another size than
            the model takes, or the compiler is missing.
    """
    plan.outputs = check_outputs(plan, outputs)
    _check_size(plan)
    if not FORMATS[name].fixed_batch:
        return
    plan.batch_size, largest = batch_size or 1, largest_batch(plan.model)
    if plan.batch_size > largest:
        raise UsageError(
            f"batch size {plan.batch_size} is too large for {plan.name}", f"use at most {largest}"
        )
    if not has_compiler():
        raise UsageError(
            "aoti needs a C++ compiler, and none is found",
            f"install one, such as g++, or name it in the variable CXX; {NEEDS_NO_COMPILER}",
        )
    plan.notes.append(UNCHECKED)


def _check_size(plan: ConversionPlan) -> None:
    """Check that the input is large enough for the program.

    Raises:
        UsageError: It is not.
    """
    model, size = plan.model, "x".join(map(str, plan.size))
    if isinstance(model, HieraDet):
        least = model._config.least_size()
        if any(side < other for side, other in zip(plan.size, least, strict=True)):
            raise UsageError(f"{size} is too small", f"give at least {least[0]}x{least[1]} pixels")
    elif takes_units(plan) and isinstance(model, HieraEncoder) and model.layout.windows < 2:
        raise UsageError(
            f"an input of {size} has one mask unit, which cannot be hidden and seen",
            "give a larger size, or return the embedding or maps",
        )


def write_program(plan: ConversionPlan, name: str, path: Path) -> None:
    """Export a model to a file.

    Args:
        plan: The model to write.
        name: Name of the format, a key of `EXPORTERS`.
        path: The file.

    Raises:
        OSError: The file cannot be written.
        DeviceError: The compiler fails.
    """
    model = plan.build()
    prepare_for_export(model, plan.size)
    program = Program(model, plan.outputs, DTYPES[plan.dtype]).eval()
    with quiet_exporters(), torch.no_grad():
        exported = _export(program, plan, model)
        EXPORTERS[name](exported, plan, path)


def _export(program: Program, plan: ConversionPlan, model: Encoder) -> Any:
    """Trace a program. Sizes are constants, but for the batch and the number of visible units."""
    if plan.batch_size is not None:
        return torch.export.export(program, _example(plan, plan.batch_size))
    # Larger batches would need another program: the model splits their fused attention.
    shapes: list[dict[int, Any]] = [{0: torch.export.Dim("batch", min=1, max=largest_batch(model))}]
    units = 0
    if takes_units(plan):
        assert isinstance(model, HieraEncoder)
        units = model.layout.windows
        visible = {1: torch.export.Dim("visible", min=1, max=units - 1)} if units > 2 else {}
        shapes.append({**shapes[0], **visible})
    # Two inputs and two visible units, because torch.export treats a size of one as a constant.
    example = _example(plan, 2, least=2 if units > 2 else 1)
    return torch.export.export(program, example, dynamic_shapes=tuple(shapes))


def _example(plan: ConversionPlan, batch: int, least: int = 1) -> tuple[torch.Tensor, ...]:
    """Return inputs of a program, to trace it with. At least `least` mask units are visible."""
    x = torch.zeros(batch, plan.config["in_chans"], *plan.size)
    return (x, draw_keep(plan, batch, least)) if takes_units(plan) else (x,)


def metadata(plan: ConversionPlan) -> dict[str, str]:
    """Return what a user of the file needs in addition to the program. Values that are not text
    are encoded as JSON."""
    card = {key: str(value) for key, value in plan.card.items() if key in ("source", "licence")}
    fixed = {}
    if plan.batch_size is not None:
        shapes = [tensor.shape for tensor in _example(plan, plan.batch_size)]
        fixed = {"batch_size": str(plan.batch_size), "input_shapes": json.dumps(shapes)}
    return {
        "model": plan.name,
        **card,
        "input_size": json.dumps(plan.size),
        "inputs": json.dumps(input_names(plan)),
        "outputs": json.dumps(tensor_names(plan)),
        **fixed,
        "labels": json.dumps(plan.class_names or []),
        "preprocessing": json.dumps(vars(plan.transform)),
    }


def _write_pt2(exported: Any, plan: ConversionPlan, path: Path) -> None:
    with open_deferring_errors(path) as file:
        torch.export.save(exported, file, extra_files=metadata(plan))


def _write_onnx(exported: Any, plan: ConversionPlan, path: Path) -> None:
    program = torch.onnx.export(
        exported,
        input_names=input_names(plan),
        output_names=tensor_names(plan),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    _name_dimensions(program.model.graph)
    program.model.metadata_props.update(metadata(plan))
    size = sum(t.numel() * t.element_size() for t in exported.state_dict.values())
    program.save(path, external_data=size > PROTOBUF_LIMIT * 0.9)


def _name_dimensions(graph: Any) -> None:
    """Name the dimensions of an ONNX graph that are not fixed: torch.export calls them s18, s22."""
    names = {}
    for given, dims in zip(graph.inputs, (["batch"], ["batch", "visible"]), strict=False):
        for dim, name in zip(given.shape, dims, strict=False):
            if not isinstance(dim, int):
                names[dim.value] = name
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        for index, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                value.shape[index] = re.sub(r"\w+", lambda m: names.get(m[0], m[0]), dim.value)


def _write_package(exported: Any, plan: ConversionPlan, path: Path) -> None:
    content = compile_package(exported, metadata(plan))
    with open_deferring_errors(path) as file:
        file.write(content)


EXPORTERS: dict[str, Callable[[Any, ConversionPlan, Path], None]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "aoti": _write_package,
}
