"""`convert`: read, fit, write beside DEST, prove, and only then let it be DEST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import atomic_destination
from ..device import single_thread
from ..errors import UsageError
from ..models import factory
from ..models.pos_embed import ResampleRule
from . import export_program, formats, plan, publish, sample_inputs, verify, write_weights
from .plan import ConversionPlan
from .verify import Proof


@dataclass
class Conversion:
    """What came of it."""

    source: str
    output: Path
    format: str
    model: str
    input_size: tuple[int, ...]
    dtype: str
    bytes: int  # of all files
    files: list[str]
    proof: Proof
    notes: list[str]
    url: str | None = None  # on the hub

    def to_json(self) -> dict[str, Any]:
        values = {**vars(self), "output": str(self.output), "proof": self.proof.to_json()}
        return {**values, "input_size": list(self.input_size)}


def convert(
    source: str,
    dest: str | Path,
    to: str,
    *,
    size: Sequence[int] | None = None,
    dtype: str = "auto",
    resample: ResampleRule = "absolute-window",
    verify: str = "auto",
    pictures: Sequence[str] = (),
    overwrite: bool = False,
    push_to_hub: str | None = None,
) -> Conversion:
    """Write a checkpoint in another format and prove that it is the same model.

    Args:
        source: zoo name, hub repository, folder, URL or file, in any dialect.
        dest: a folder (hub, timm, transformers) or file (pth, onnx, pt2) to write.
        to: the format: see `targets.TARGETS`.
        size: input size in pixels (and frames), one side standing for both.
        dtype: `auto` (as the source has it; programs fp32), `fp32`, `bf16`, `fp16`.
        resample: how position embeddings come to another size: `absolute-window` or `bicubic`.
        verify: `auto` compares renamed tensors bit by bit, and answers where values or the program
            changed; `forward` compares answers too.
        pictures: files or folders to compare answers on, in place of those at hand.
        overwrite: replace DEST.
        push_to_hub: a repository to publish it in.

    Raises:
        UsageError: DEST exists, the format has no such model, or no such input size.
        CheckpointError: the source is no sound checkpoint, or the proof failed. No DEST is left.
        HubError: it cannot be fetched or published.
        OutputError: it cannot be written. No DEST is left.
    """
    dest = Path(dest)
    target = formats.check_destination(dest, to, dtype=dtype, overwrite=overwrite)
    if push_to_hub is not None:
        publish.check(push_to_hub)
    program = target.dialect is None
    with single_thread():
        read = factory.read_weights(source)
    made = plan.make_plan(
        read,
        size=size,
        dtype="fp32" if program and dtype == "auto" else dtype,
        resample=resample,
    )
    plan.adapt_to_format(made, to)
    (export_program if program else write_weights).check(made, to)
    compare = program or bool(made.changed) or verify == "forward"
    shown = None
    if compare and len(made.size) == 1:
        raise UsageError(
            "answers are compared on pictures, and this model takes signals",
            "use hub or pth, at its own size and precision",
        )
    if compare:
        shown = sample_inputs.gather_samples(made.transform, made.config["in_chans"], pictures)
    with atomic_destination(dest, is_folder=target.folder) as folder:
        written = folder if target.folder else folder / dest.name
        proven = _write(made, to, written, shown)
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    url = None if push_to_hub is None else publish.push(dest, push_to_hub, list(sizes))
    return Conversion(
        source,
        dest,
        to,
        made.name,
        made.size,
        made.dtype,
        sum(sizes.values()),
        sorted(sizes),
        proven,
        made.notes,
        url,
    )


def _write(
    made: ConversionPlan, to: str, path: Path, shown: sample_inputs.SampleInputs | None
) -> Proof:
    """Write and prove."""
    tensors = None
    if formats.FORMATS[to].dialect is None:
        export_program.write_program(made, to, path)
    else:
        state = write_weights.write_weights(made, to, path)
        with single_thread():
            tensors = verify.verify_bits(
                path / formats.WEIGHTS_NAME if path.is_dir() else path, state
            )
    if shown is None:
        return Proof(tensors=tensors)
    found = verify.verify_outputs(made, to, path, shown)
    found.tensors = tensors
    return found
