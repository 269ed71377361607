"""Proof that what was written is what was meant.

Renamed checkpoints are read back and compared bit by bit. Where values or the program changed (or
when asked), the written file is loaded by the target's own library and answers real pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..device import is_out_of_memory
from ..errors import CheckpointError, first_line
from ..weights import files
from .export_program import output_name
from .plan import ConversionPlan, drop_decoder, make_plan
from .read_back import LoadedModel, read_back, wrap_model
from .sample_inputs import SampleInputs

GROUP_BYTES = 256 << 20
# Largest difference of logits (or of a reconstruction's loss), as a share of the largest of them or
# of 1. Programs in 16 bits round in other places than we do.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}


@dataclass
class Cost:
    """What the change cost, against the source as it was."""

    max_difference: float  # of probabilities, or of features
    agree: int | None  # inputs with the same first class


@dataclass
class Proof:
    """What was compared, and how it came out."""

    tensors: int | None = None  # bit-equal ones
    reader: str | None = None  # the library that answered
    inputs: int = 0
    samples: str = ""  # what they were
    max_difference: float | None = None  # of logits, features or losses: `what`
    what: str = ""
    agree: int | None = None  # inputs with the same first class
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "", 0)}


def verify_bits(path: Path, expected: Mapping[str, torch.Tensor]) -> int:
    """Read the file again and compare every tensor: names, shapes, types, bits. -> their number

    In groups, each mapped anew, so that memory holds one group and not the whole file again.

    Raises:
        CheckpointError: something differs.
    """
    if odd := sorted(files.read_tensors(path).keys() ^ expected.keys()):
        raise verification_error(f"{odd[0]} is in one of the two only")
    for group in _groups(expected):
        written = files.read_tensors(path, only=group)
        for name in group:
            if not _same(written[name], expected[name]):
                raise verification_error(f"{name} differs")
    return len(expected)


def verify_outputs(plan: ConversionPlan, name: str, path: Path, samples: SampleInputs) -> Proof:
    """Load the written file in its own library and compare its answers with the plan's.

    Args:
        name: the format.
        path: file or folder.

    Raises:
        CheckpointError: they differ by more than the format's arithmetic.
    """
    reader = read_back(plan, name, path)
    proof = Proof(reader=reader.name, inputs=len(samples), samples=samples.description)
    try:
        got = outputs_of(reader, samples)
    except Exception as error:  # libraries raise many types
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise verification_error(f"{reader.name} cannot run it: {reason}") from error
    expected = outputs_of(wrap_model(plan.build(), plan.is_autoencoder), samples)
    scale = max(1.0, expected.abs().max().item())
    proof.what = "losses" if plan.is_autoencoder else output_name(plan)
    proof.max_difference = (got - expected).abs().max().item()
    allowed = TOLERANCE[plan.dtype if reader.computes_as_stored else "fp32"] * scale
    if not proof.max_difference <= allowed:  # also when it is nan
        raise verification_error(
            f"{reader.name} answers otherwise: {proof.max_difference:.2g} off, "
            f"{allowed:.2g} allowed"
        )
    if plan.num_classes:
        proof.agree = _agree(got, expected)
    if plan.changed:
        proof.cost = _cost(plan, got, samples)
    return proof


def outputs_of(reader: LoadedModel, samples: SampleInputs) -> torch.Tensor:
    """Logits of all samples [n, classes]; of autoencoders the loss of each [n, 1]."""
    with torch.inference_mode():
        return torch.cat([reader.run(batch).float().cpu() for batch in samples.batches()])


def verification_error(reason: str) -> CheckpointError:
    return CheckpointError(
        f"the written file is not what it should be ({reason}); it was removed",
        "report this, with the command",
    )


def _cost(plan: ConversionPlan, got: torch.Tensor, samples: SampleInputs) -> Cost | None:
    """Against the source's own weights at its own input size, on the same pictures."""
    if plan.is_autoencoder:
        return None
    source = make_plan(plan.checkpoint)
    if source.is_autoencoder:  # and the plan's model is none
        drop_decoder(source)
    before = outputs_of(wrap_model(source.build(), False), samples.at(source.size))
    if not plan.num_classes:
        return Cost((before - got).abs().max().item(), None)
    before, got = before.softmax(-1), got.softmax(-1)
    return Cost((before - got).abs().max().item(), _agree(before, got))


def _agree(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.argmax(-1) == other.argmax(-1)).sum())


def _groups(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
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


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    wide = torch.int64 if a.numel() % 8 == 0 else torch.uint8
    return torch.equal(a.view(wide), b.view(wide))
