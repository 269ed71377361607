"""Convert a checkpoint: read it, write it to a temporary folder, verify it, rename it to DEST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..atomic import atomic_destination
from ..atomic.lock import exclusive
from ..device import dtype_name, is_out_of_memory, single_thread
from ..errors import DeviceError, UsageError, check_choice
from ..models.pos_embed import ResampleRule
from ..weights import load
from . import export_program, formats, publish, write_weights
from .plan import ConversionPlan, adapt_to_format, make_plan
from .sample_inputs import SampleInputs, gather_samples
from .verify import Proof, verify_bits, verify_outputs


@dataclass
class Conversion:
    """Result of a conversion: what was written, and how it was verified."""

    source: str
    output: Path
    format: str
    model: str
    input_size: tuple[int, ...]
    dtype: str
    bytes: int  # total size of all files
    files: list[str]
    proof: Proof
    notes: list[str]
    url: str | None = None  # of the hub repository

    def to_json(self) -> dict[str, object]:
        """Return the fields of the class, ready for JSON."""
        values = {**vars(self), "output": str(self.output), "proof": self.proof.to_json()}
        return {**values, "input_size": list(self.input_size)}


def convert(
    source: str | Path,
    dest: str | Path,
    to: str | None = None,
    *,
    size: int | Sequence[int] | None = None,
    dtype: str | torch.dtype = "auto",
    resample: ResampleRule = "absolute-window",
    verify: str = "auto",
    pictures: Sequence[str] = (),
    overwrite: bool = False,
    push_to_hub: str | None = None,
    returns: Sequence[str] = (),
    batch_size: int | None = None,
) -> Conversion:
    """Write a checkpoint in another format and verify that it holds the intended model.

    Args:
        source: Zoo name, hub repository, folder, URL or file, in any naming.
        dest: Folder (hub, timm, transformers) or file (pth, sam2, onnx, pt2, aoti) to write.
        to: Name of the format, see `formats.FORMATS`; None for that of the extension of DEST:
            `.onnx`, `.pt2` or `.pth`.
        size: Input size in pixels, with the frames first for video. A single side stands for
            height and width.
        dtype: `fp32`, `bf16` or `fp16`; or `auto` for the source's precision (programs: fp32).
        resample: Rule that resamples position embeddings to another size: `absolute-window` or
            `bicubic`.
        verify: `auto` compares the tensors of a weights file bit by bit, and the model's outputs if
            values have changed or the format is a program. `forward` compares the outputs in any
            case.
        pictures: Image files or folders to compare outputs on, in place of the package's samples.
        overwrite: Replace an existing DEST.
        push_to_hub: Hub repository to publish the result in.
        returns: What a program returns: names from `formats.OUTPUTS`. () for the logits of a
            classifier, the embedding of a model without a head, the reconstruction of an
            autoencoder, and the maps of SAM 2's encoder.
        batch_size: Size of every batch of an AOTInductor package; None for 1.

    Returns:
        The result: what was written, and the proof.

    Raises:
        UsageError: DEST exists, its extension stands for no format and none is named, the format
            cannot hold this model, an output or the input size is not legal, or the C++ compiler
            for an AOTInductor package is missing.
        CheckpointError: The source is not a usable checkpoint, or verification failed. DEST is
            not changed.
        HubError: The source cannot be fetched, or the result cannot be published.
        OutputError: DEST cannot be written. DEST is not changed.
        DeviceError: The C++ compiler fails, or memory runs out. DEST is not changed.
    """
    check_choice("verification", verify, ("auto", "forward"))
    if not isinstance(source, str | Path):
        raise UsageError(
            f"convert takes the name or path of a model, not one of type {type(source).__name__}",
            "save it with model.save_pretrained(folder), and convert the folder",
        )
    source, dtype = str(source), dtype_name(dtype)
    if to is None:
        to = formats.format_of(dest)
    if to is None:
        choices = ", ".join(formats.FORMATS)
        raise UsageError(f"{str(dest)!r} does not say its format", f"give one of {choices}")
    formats.check_ending(dest, to)
    dest = Path(dest)
    target = formats.check_destination(dest, to, dtype=dtype, overwrite=overwrite)
    formats.check_program_options(to, returns, batch_size)
    if push_to_hub is not None:
        publish.check(push_to_hub)
    with exclusive(dest, beside=True):  # a second conversion to DEST is refused at once
        formats.check_destination(dest, to, dtype=dtype, overwrite=overwrite)
        is_program = target.is_program
        with single_thread():
            checkpoint = load.read_weights(source)
        if is_program and dtype == "auto":
            dtype = "fp32"
        size = (size,) if isinstance(size, int) else size
        plan = make_plan(checkpoint, size=size, dtype=dtype, resample=resample)
        adapt_to_format(plan, to)
        if is_program:
            export_program.prepare_program(plan, to, returns, batch_size)
        else:
            write_weights.check_representable(plan, to)
        samples = None
        if is_program or plan.changed or verify == "forward":
            samples = _gather_samples(plan, pictures)
        with atomic_destination(dest, is_folder=target.folder) as folder:
            path = folder if target.folder else folder / dest.name
            try:
                proof = _write_and_verify(plan, to, path, samples)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise DeviceError(
                    f"memory ran out while {to} was written", "use a smaller batch or input size"
                ) from error
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    url = None if push_to_hub is None else publish.push(dest, push_to_hub, list(sizes))
    return Conversion(
        source=source,
        output=dest,
        format=to,
        model=plan.name,
        input_size=plan.size,
        dtype=plan.dtype,
        bytes=sum(sizes.values()),
        files=sorted(sizes),
        proof=proof,
        notes=plan.notes,
        url=url,
    )


def _gather_samples(plan: ConversionPlan, pictures: Sequence[str]) -> SampleInputs:
    """Return the samples to compare outputs on.

    Raises:
        UsageError: The model takes signals, or none of the pictures can be read.
    """
    if len(plan.size) == 1:
        raise UsageError(
            "outputs are compared on pictures, and this model takes signals",
            "use hub or pth, and keep its size and precision",
        )
    return gather_samples(plan.transform, plan.config["in_chans"], pictures)


def _write_and_verify(
    plan: ConversionPlan, name: str, path: Path, samples: SampleInputs | None
) -> Proof:
    """Write the model of a plan in the format `name`. Compare the tensors of a weights file, and
    the outputs if there are samples."""
    tensors = None
    if formats.FORMATS[name].is_program:
        export_program.write_program(plan, name, path)
    else:
        state = write_weights.write_weights(plan, name, path)
        weights = path / formats.WEIGHTS_NAME if path.is_dir() else path
        with single_thread():
            tensors = verify_bits(weights, state)
    if samples is None:
        return Proof(tensors=tensors)
    proof = verify_outputs(plan, name, path, samples)
    proof.tensors = tensors
    return proof
