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
from .plan import ConversionPlan, drop_decoder, make_plan
from .read_back import LoadedModel, named, read_back, wrap_model, wrap_program
from .sample_inputs import SampleInputs

GROUP_BYTES = 256 << 20  # size of a group of tensors that is compared at a time
# Largest accepted difference of logits, embeddings or losses, relative to the largest of them or to
# 1, whichever is larger. 16-bit programs compute in 16 bits and are compared with float32 outputs.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
PLURALS = {"embedding": "embeddings", "reconstruction": "reconstructions"}


@dataclass
class Cost:
    """Effect of changed values: how much outputs differ from those of the unchanged source."""

    max_difference: float  # of probabilities, or of embeddings
    agree: int | None  # number of inputs with the same top-1 class


@dataclass
class Proof:
    """What was compared, and the result."""

    tensors: int | None = None  # number of tensors, all of them equal bit by bit
    reader: str | None = None  # library whose outputs were compared, with its version
    inputs: int = 0  # number of samples
    samples: str = ""  # description of the samples
    max_difference: float | None = None  # of the outputs
    what: str = ""  # kinds of outputs: logits, embeddings, losses, maps
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
    ours = wrap_program(plan) if plan.outputs else wrap_model(plan.build(), plan.is_autoencoder)
    differences, scales, kept = _compare(reader, ours, samples, plan)
    allowed = TOLERANCE[plan.dtype if reader.computes_as_stored else "fp32"]
    proof.what = _kind_of_outputs(plan)
    proof.max_difference = max(differences.values())
    for tensor, difference in differences.items():
        limit = allowed * max(1.0, scales[tensor])
        if not difference <= limit:  # also if it is NaN
            which = f"{tensor} differs" if tensor else "outputs differ"
            raise verification_error(
                f"{reader.name} answers otherwise: {which} by {difference:.2g}, "
                f"at most {limit:.2g} is allowed"
            )
    if not kept:
        return proof
    got, expected = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if plan.num_classes and got.shape[-1] == plan.num_classes:
        proof.agree = _count_agreeing(got, expected)
    if plan.changed:
        proof.cost = _measure_cost(plan, got, samples)
    return proof


def _compare(
    reader: LoadedModel, ours: LoadedModel, samples: SampleInputs, plan: ConversionPlan
) -> tuple[dict[str, float], dict[str, float], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Run both models on all samples, batch by batch.

    Returns:
        By name of the output: the largest difference, and the largest value. And the output itself,
        of the library and ours, for each batch, if it is a vector.
    """
    differences: dict[str, float] = {}
    scales: dict[str, float] = {}
    kept = []
    for batch in samples.batches(plan.batch_size):
        try:
            with torch.inference_mode():
                got = named(plan, reader.run(batch))
        except Exception as error:  # libraries raise errors of many types
            if is_out_of_memory(error):
                raise
            reason = first_line(error)
            raise verification_error(f"{reader.name} cannot run it: {reason}") from error
        with torch.inference_mode():
            expected = named(plan, ours.run(batch))
        if {n: t.shape for n, t in got.items()} != {n: t.shape for n, t in expected.items()}:
            raise verification_error(f"{reader.name} returns {_shapes(got)}")
        for name, tensor in expected.items():
            one, other = tensor.float().cpu(), got[name].float().cpu()
            difference = (one - other).abs().max().item()
            before = differences.get(name, 0.0)
            differences[name] = before if difference <= before else difference  # NaN stays
            scales[name] = max(scales.get(name, 0.0), one.abs().max().item())
        first = next(iter(expected))
        if expected[first].dim() == 2 and not plan.is_autoencoder:
            kept.append((got[first].float().cpu(), expected[first].float().cpu()))
    return differences, scales, kept


def _shapes(tensors: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name or 'an output'} {tuple(t.shape)}" for name, t in tensors.items())


def _kind_of_outputs(plan: ConversionPlan) -> str:
    """Return what is compared, as text."""
    if plan.outputs:
        return " and ".join(PLURALS.get(output, output) for output in plan.outputs)
    if plan.is_autoencoder:
        return "losses"
    return "logits" if plan.num_classes else "embeddings"


def outputs_of(reader: LoadedModel, samples: SampleInputs) -> torch.Tensor:
    """Return logits or embeddings of all samples [n, c], or losses of an autoencoder [n, 1]."""
    found = []
    with torch.inference_mode():
        for batch in samples.batches():
            output = reader.run(batch)
            assert isinstance(output, torch.Tensor)
            found.append(output.float().cpu())
    return torch.cat(found)


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
    source.outputs = plan.outputs[:1]
    model = wrap_program(source) if plan.outputs else wrap_model(source.build(), False)
    before = outputs_of(model, samples.at(source.size))
    what = plan.outputs[0] if plan.outputs else "logits" if plan.num_classes else "embedding"
    if what == "embedding":
        return Cost((before - got).abs().max().item(), None)
    if what == "logits":
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
