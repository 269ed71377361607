"""Build the steps to time: a model with random weights, on a device, with an input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import zoo
from ..compiling.compiled import compile_for_inference, compile_for_training
from ..device import DTYPES
from ..errors import HieraError, first_line
from ..models.cpu import optimize_for_inference
from ..models.factory import model_class
from ..models.masking import MASK_RATIOS, draw_units
from . import peers
from .flops import count_gmacs
from .job import OURS, Job
from .measurement import Measurement, Step, Variant

Forward = Callable[..., Any]


def build(job: Job) -> list[Variant]:
    """Build the variants of a job, which share their weights.

    Raises:
        peers.NotOffered: The peer has no such model.
        HieraError: The model is unknown, or cannot be used in this way.
    """
    entry = job.entry
    is_ours = _is_ours(job)
    if job.mode == "files":
        return _build_files(job, entry)
    if is_ours and job.mode == "train" and entry.family == "hiera":
        return _build_training(job)
    device, dtype = torch.device(job.device), DTYPES[job.dtype]
    model = _build_ours(entry, device, dtype) if is_ours else _build_peer(job, entry)
    model = model.to(device, dtype)
    if device.type == "cuda" and entry.kind == "image":
        model = model.to(memory_format=torch.channels_last)  # for the patch embedding
    model.train(job.mode != "infer")
    variants = []
    for attention, compiled in _kinds(job):
        row = _new_row(job, model, attention, compiled)
        variants.append(Variant(row, _make_step(job, entry, model, attention, compiled)))
    return variants


def _kinds(job: Job) -> list[tuple[str | None, bool]]:
    """Return what is measured of a job: the attention, None for peers, and whether compiled."""
    kinds: list[tuple[str | None, bool]] = [(None, False)]
    if _is_ours(job):
        kinds = [(attention, False) for attention in job.attentions]
    elif peers.PEERS[job.implementation].compiles:
        return [(None, job.compile)]
    if job.compile:
        kinds.append((kinds[0][0], True))
    return kinds


def _new_row(job: Job, model: nn.Module, attention: str | None, compiled: bool) -> Measurement:
    is_ours = _is_ours(job)
    return Measurement.of_job(
        job,
        attention,
        compiled,
        version=None if is_ours else peers.version(job.implementation),
        params=sum(p.numel() for p in model.parameters()),
        gmacs=count_gmacs(job),
    )


def _build_training(job: Job) -> list[Variant]:
    """Return the steps of `hiera train`."""
    from .end_to_end.training_work import TrainingWork  # here, because it imports much

    work, variants = TrainingWork(job), []
    for attention, compiled in _kinds(job):
        row = _new_row(job, work.model, attention, compiled)
        row.notes += work.notes
        step = work if compiled or not job.compile else work.uncompiled
        variants.append(Variant(row, _with_attention(work.model, attention, step)))
    return variants


def _build_files(job: Job, entry: zoo.ModelEntry) -> list[Variant]:
    """Return the runs from files to answers, and of decoding alone."""
    from .end_to_end import our_files, timm_files

    if _is_ours(job):
        return our_files.build(job)
    if job.implementation != "timm":
        raise peers.NotOffered(f"--from compares with timm alone, not with {job.implementation}")
    row = Measurement.of_job(job, None, False, version=peers.version("timm"))
    return timm_files.build(job, row, _build_peer(job, entry))


def _build_ours(entry: zoo.ModelEntry, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build our model with uniform random weights. The usual initialisation takes seconds, and
    does not change the speed."""
    with torch.device("meta"):
        model: nn.Module = model_class(entry)(**entry.config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.04, 0.04)
    return model


def _build_peer(job: Job, entry: zoo.ModelEntry) -> nn.Module:
    """Return a peer's model.

    Raises:
        peers.NotOffered: The peer has no such model, or does not know its constructor arguments.
    """
    build_model = peers.PEERS[job.implementation].build
    if job.description is None:
        return build_model(entry, job.mode)
    peers.check_arguments(job.implementation, entry)
    try:
        return build_model(entry, job.mode)
    except TypeError as error:
        raise peers.NotOffered(
            f"{job.implementation} cannot build {job.model}: {first_line(error)}"
        ) from error


def _make_step(
    job: Job, entry: zoo.ModelEntry, model: nn.Module, attention: str | None, compiled: bool
) -> Step:
    device, dtype = torch.device(job.device), DTYPES[job.dtype]
    channels, size = entry.config.get("in_chans", 3), entry.config["input_size"]
    x = torch.randn(job.batch, channels, *size, device=device).to(dtype)
    if device.type == "cuda" and entry.kind == "image":
        x = x.contiguous(memory_format=torch.channels_last)
    called: Forward = model
    if not _is_ours(job) and peers.PEERS[job.implementation].compiles:
        compiled = False  # its program is compiled already
    if job.mode == "infer":
        if compiled:
            called = compile_for_inference(model, device, model if _is_ours(job) else None)
        elif _is_ours(job):
            optimize_for_inference(model)
        run = torch.inference_mode()(_make_forward(job, entry, model, x, called))
        return _with_attention(model, attention, run)
    if compiled:
        called = compile_for_training(model, fullgraph=_is_ours(job))
    run = _make_loss(entry, _make_forward(job, entry, model, x, called), job.batch, device)
    optimizer = None
    if job.mode == "train":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        run().backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()  # sets gradients to None, as in training

    return _with_attention(model, attention, step)


def _is_ours(job: Job) -> bool:
    return job.implementation == OURS


def _make_forward(
    job: Job, entry: zoo.ModelEntry, model: nn.Module, x: torch.Tensor, called: Forward
) -> Step:
    """Return the forward pass as a step. `called` is the model, or its compiled form.

    Autoencoders get a new mask at each call. For ours, the visible units are drawn here; peers draw
    their own masks.
    """
    if not entry.autoencoder or job.implementation == "transformers":
        return lambda: called(x)
    if _is_ours(job):
        return lambda: called(
            x, keep_ids=_draw_units(entry, model, job.batch, x.device), check_ids=False
        )
    return lambda: called(x, mask_ratio=MASK_RATIOS[entry.kind])


def _draw_units(
    entry: zoo.ModelEntry, model: Any, batch: int, device: torch.device
) -> torch.Tensor:
    return draw_units(batch, model.layout.windows, MASK_RATIOS[entry.kind], device=device)


def _make_loss(entry: zoo.ModelEntry, forward: Step, batch: int, device: torch.device) -> Step:
    if entry.family == "hieradet":  # it has no classes
        return lambda: torch.stack([m.float().square().mean() for m in forward()]).sum()
    classes = entry.config.get("num_classes", 1000)
    if not classes and not entry.autoencoder:  # the output is features
        return lambda: forward().float().square().mean()
    target = torch.arange(batch, device=device) % max(1, classes)

    def loss() -> torch.Tensor:
        output: Any = forward()
        own_loss = peers.loss_of(output)
        if own_loss is not None:
            return own_loss
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return F.cross_entropy(logits.float(), target)

    return loss


def _with_attention(model: Any, attention: str | None, run: Step) -> Step:
    """Return a step that sets the attention of our model, if needed, before it runs."""
    if attention is None:
        return run

    def step() -> Any:
        if model.benchmarked_attention != attention:  # another variant ran last
            model.set_attention(attention)
            model.benchmarked_attention = attention
        return run()

    model.benchmarked_attention = None

    return step


@contextlib.contextmanager
def translate_errors(job: Job) -> Any:
    """Convert unexpected errors, of a peer for example, to a RuntimeError that names the
    implementation."""
    try:
        yield
    except (HieraError, peers.NotOffered, MemoryError, RuntimeError):
        raise
    except Exception as error:
        raise RuntimeError(f"{job.implementation}: {type(error).__name__}: {error}") from error
