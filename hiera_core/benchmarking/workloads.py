"""Models made ready to be timed: built with random weights, put on a device, given an input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import zoo
from ..device import DTYPES, compile_for_inference, compile_for_training
from ..errors import HieraError
from ..models.hiera import Hiera
from ..models.mae import MaskedAutoencoderHiera
from ..models.masking import MASK_RATIOS, draw_units
from . import peers
from .job import OURS, Job, Measurement

Step = Callable[[], Any]


@dataclass
class Variant:
    """Something to be timed, and the row that its figures go to."""

    row: Measurement
    step: Step


def build(job: Job) -> list[Variant]:
    """All variants of a job; they share their weights.

    Raises:
        peers.NotOffered: the peer has no such model.
        HieraError: no such model, or it cannot be used this way.
    """
    row = zoo.get(job.model)
    device, dtype = torch.device(job.device), DTYPES[job.dtype]
    model = _ours(row, device, dtype) if job.implementation == OURS else _peer(job, row)
    model = model.to(device, dtype)
    if device.type == "cuda" and row.kind == "image":
        model = model.to(memory_format=torch.channels_last)  # of the patch embedding
    model.train(job.mode != "infer")
    forms: list[tuple[str | None, bool]] = [(None, False)]
    if job.implementation == OURS:
        forms = [(attention, False) for attention in job.attentions]
    if job.compile:
        forms.append((forms[0][0], True))
    gmacs = count_gmacs(job)
    variants = []
    for attention, compiled in forms:
        found = Measurement(
            job.model, job.implementation, attention, compiled, job.mode, job.device, job.dtype,
            job.batch, "clips" if row.kind == "video" else "images",
            version=None if job.implementation == OURS else peers.version(job.implementation),
            params=sum(p.numel() for p in model.parameters()),
            gmacs=gmacs, published=row.speed if job.implementation == OURS else None,
        )  # fmt: skip
        variants.append(Variant(found, _step(job, row, model, attention, compiled)))
    return variants


def count_gmacs(job: Job) -> float | None:
    """1e9 multiply-adds of a forward pass on one input, with eager attention: fused and compiled
    kernels may be invisible to the counter. On the meta device: nothing is computed."""
    row = zoo.get(job.model)
    with torch.device("meta"):
        if job.implementation == OURS or peers.PEERS[job.implementation].same_model:
            model: nn.Module = _class(row)(**row.config)
            model.set_attention("eager")  # type: ignore[operator]
        else:
            model = peers.PEERS[job.implementation].build(row, job.mode)
        x = torch.empty(1, 3, *row.config["input_size"])
        arguments = {"mask": _units(row, model, 1, x.device)} if row.autoencoder else {}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(x, **arguments)
    return counter.get_total_flops() / 2e9


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """1e9 operations a second of a large product: what the device can be asked for.

    On a CPU by the fastest library at hand, which need not be the one behind `torch.matmul`.
    """
    from ..models.cpu import Linear
    from .timer import timed

    size = 2048 if device.type == "cpu" else 8192
    layer = Linear(size, size, device=device, dtype=dtype)
    x = torch.randn(size, size, device=device, dtype=dtype)
    with torch.inference_mode():
        timed(lambda: layer(x), device)
        best = min(timed(lambda: layer(x), device) for _ in range(8))
    return 2 * size**3 / best / 1e9


def _class(row: zoo.ModelEntry) -> Any:
    return MaskedAutoencoderHiera if row.autoencoder else Hiera


def _ours(row: zoo.ModelEntry, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Without the initialisation, which takes seconds and changes no speed."""
    with torch.device("meta"):
        model: nn.Module = _class(row)(**row.config)
    model = model.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.04, 0.04)
    return model


def _peer(job: Job, row: zoo.ModelEntry) -> nn.Module:
    return peers.PEERS[job.implementation].build(row, job.mode)


def _step(
    job: Job, row: zoo.ModelEntry, model: nn.Module, attention: str | None, compiled: bool
) -> Step:
    device, dtype = torch.device(job.device), DTYPES[job.dtype]
    x = torch.randn(job.batch, 3, *row.config["input_size"], device=device).to(dtype)
    if device.type == "cuda" and row.kind == "image":
        x = x.contiguous(memory_format=torch.channels_last)
    forward = _forward(job, row, model, x)
    if job.mode == "infer":
        run: Step = compile_for_inference(forward, device) if compiled else forward
        return _with_attention(model, attention, torch.inference_mode()(run))
    loss = _loss(row, forward, job.batch, device)
    run = compile_for_training(loss, device) if compiled else loss
    optimizer = None
    if job.mode == "train":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        run().backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()  # gradients are made anew, as in training

    return _with_attention(model, attention, step)


def _forward(job: Job, row: zoo.ModelEntry, model: nn.Module, x: torch.Tensor) -> Step:
    """Autoencoders draw a new mask each time: ours as the numbers of visible units, peers as each
    of them does it by itself."""
    if not row.autoencoder or job.implementation == "transformers":
        return lambda: model(x)
    if job.implementation == OURS:
        return lambda: model(x, mask=_units(row, model, job.batch, x.device))
    return lambda: model(x, mask_ratio=MASK_RATIOS[row.kind])


def _units(row: zoo.ModelEntry, model: Any, batch: int, device: torch.device) -> torch.Tensor:
    return draw_units(batch, model.layout.windows, MASK_RATIOS[row.kind], device=device)


def _loss(row: zoo.ModelEntry, forward: Step, batch: int, device: torch.device) -> Step:
    target = torch.arange(batch, device=device) % row.config["num_classes"]

    def loss() -> torch.Tensor:
        output: Any = forward()
        found = peers.loss_of(output)
        if found is not None:
            return found
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return F.cross_entropy(logits.float(), target)

    return loss


def _with_attention(model: Any, attention: str | None, run: Step) -> Step:
    if attention is None:
        return run

    def step() -> Any:
        if model.benchmarked_attention != attention:  # another variant's turn is over
            model.set_attention(attention)
            model.benchmarked_attention = attention
        return run()

    model.benchmarked_attention = None

    return step


@contextlib.contextmanager
def in_words(job: Job) -> Any:
    """Errors of a peer's own making, as ours."""
    try:
        yield
    except (HieraError, peers.NotOffered, MemoryError, RuntimeError):
        raise
    except Exception as error:
        raise RuntimeError(f"{job.implementation}: {type(error).__name__}: {error}") from error
