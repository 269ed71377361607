"""Verify that a written file holds the intended model.

Weights files are read back and compared bit by bit. If values have changed, if the format is a
program, or on request, the library of the format also loads the file, and its outputs for real
images are compared with the outputs of our model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..device import is_out_of_memory
from ..errors import CheckpointError, first_line
from ..weights import files
from .export_program import output_name
from .plan import ConversionPlan, drop_decoder, make_plan
from .read_back import LoadedModel, read_back, wrap_model
from .sample_inputs import SampleInputs

GROUP_BYTES = 256 << 20  # size of a group of tensors that is compared at a time
# Largest accepted difference of logits, features or losses, relative to the largest of them or to
# 1, whichever is larger. 16-bit programs compute in 16 bits and are compared with float32 outputs.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


@dataclass
class Cost:
    """Effect of changed values: how much outputs differ from those of the unchanged source."""

    max_difference: float  # of probabilities, or of features
    agree: int | None  # number of inputs with the same top-1 class


@dataclass
class Proof:
    """What was compared, and the result."""

    tensors: int | None = None  # number of tensors, all of them equal bit by bit
    reader: str | None = None  # library whose outputs were compared, with its version
    inputs: int = 0  # number of samples
    samples: str = ""  # description of the samples
    max_difference: float | None = None  # of the outputs
    what: str = ""  # kind of the outputs: logits, features or losses
    agree: int | None = None  # number of inputs with the same top-1 class
    cost: Cost | None = None

    def to_json(self) -> dict[str, object]:
        """Return what was compared, ready for JSON. A difference of 0 is a result, too."""
        values = {key: value for key, value in asdict(self).items() if value not in (None, "")}
        if self.reader is None:  # no outputs were compared
            del values["inputs"]
        return values


def verify_bits(path: Path, expected: Mapping[str, torch.Tensor]) -> int:
    """Compare every tensor of a weights file with `expected`: names, shapes, dtypes and bits.

    Each group of tensors is read with a new memory map. So memory holds one group at a time, not
    the whole file.

    Returns:
        The number of tensors.

    Raises:
        CheckpointError: A tensor is missing, unexpected or different.
    """
    written_names = set(files.read_tensors(path))
    if missing := sorted(expected.keys() - written_names):
        raise verification_error(f"{missing[0]} is missing")
    if unexpected := sorted(written_names - expected.keys()):
        raise verification_error(f"{unexpected[0]} is unexpected")
    for group in _groups(expected):
        written = files.read_tensors(path, only=group)
        for name in group:
            if not _equal_bits(written[name], expected[name]):
                raise verification_error(f"{name} differs")
    return len(expected)


def verify_outputs(plan: ConversionPlan, name: str, path: Path, samples: SampleInputs) -> Proof:
    """Load a written file with its library, and compare its outputs with those of our model.

    Args:
        plan: The model that was written.
        name: Name of the format.
        path: File or folder.
        samples: Inputs to compare on.

    Raises:
        CheckpointError: The library cannot load or run the file, or outputs differ by more than
            `TOLERANCE`.
    """
    reader = read_back(plan, name, path)
    proof = Proof(reader=reader.name, inputs=len(samples), samples=samples.description)
    try:
        got = outputs_of(reader, samples)
    except Exception as error:  # libraries raise errors of many types
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise verification_error(f"{reader.name} cannot run it: {reason}") from error
    expected = outputs_of(wrap_model(plan.build(), plan.is_autoencoder), samples)
    scale = max(1.0, expected.abs().max().item())
    proof.what = "losses" if plan.is_autoencoder else output_name(plan)
    proof.max_difference = (got - expected).abs().max().item()
    allowed = TOLERANCE[plan.dtype if reader.computes_as_stored else "fp32"] * scale
    if not proof.max_difference <= allowed:  # also if it is NaN
        raise verification_error(
            f"{reader.name} answers otherwise: outputs differ by {proof.max_difference:.2g}, "
            f"at most {allowed:.2g} is allowed"
        )
    if plan.num_classes:
        proof.agree = _count_agreeing(got, expected)
    if plan.changed:
        proof.cost = _measure_cost(plan, got, samples)
    return proof


def outputs_of(reader: LoadedModel, samples: SampleInputs) -> torch.Tensor:
    """Return logits or features of all samples [n, c], or losses of an autoencoder [n, 1]."""
    with torch.inference_mode():
        return torch.cat([reader.run(batch).float().cpu() for batch in samples.batches()])


def verification_error(reason: str) -> CheckpointError:
    """Return the error for a written file that is wrong."""
    return CheckpointError(
        f"the written file is not what it should be ({reason}); it was removed",
        "report this, and include the command",
    )


def _measure_cost(plan: ConversionPlan, got: torch.Tensor, samples: SampleInputs) -> Cost | None:
    """Compare outputs with those of the source's own weights, at its own input size, on the same
    pictures. Return None for an autoencoder."""
    if plan.is_autoencoder:
        return None
    source = make_plan(plan.checkpoint)
    if source.is_autoencoder:  # then the plan has dropped the decoder, too
        drop_decoder(source)
    before = outputs_of(wrap_model(source.build(), False), samples.at(source.size))
    if not plan.num_classes:
        return Cost((before - got).abs().max().item(), None)
    before, got = before.softmax(-1), got.softmax(-1)
    return Cost((before - got).abs().max().item(), _count_agreeing(before, got))


def _count_agreeing(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return the number of inputs with the same top-1 class."""
    return int((one.argmax(-1) == other.argmax(-1)).sum())


def _groups(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yield names of tensors in groups of about GROUP_BYTES."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        group.append(name)
        size += tensor.nbytes
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group or not tensors:
        yield group


def _equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    dtype = torch.int64 if a.numel() % 8 == 0 else torch.uint8  # int64 compares faster
    return torch.equal(a.view(dtype), b.view(dtype))
