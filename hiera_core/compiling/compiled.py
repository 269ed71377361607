"""Compile models for a device: the functions that `predict`, `train` and `bench` share."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..device import is_out_of_memory
from ..errors import DeviceError
from ..models import cpu
from ..models.encoder import Encoder
from ..models.kernels.recomputing import Checkpointing, recompute
from . import aot_package, compiler_cache
from .program_cache import ProgramCache
from .program_key import program_key, signature_of
from .quiet_exporters import quiet_exporters

PROGRAMS = 5  # of a block: for training, validation, pictures, a probe, and one to spare
log = logging.getLogger("hiera")
# It warns that recomputed regions must not change tensors in place. In training, ours do not.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)


def compile_for_inference(
    function: Callable[..., Any], device: torch.device, model: nn.Module | None = None
) -> Callable[..., Any]:
    """Return the function compiled for inference, with a program for each shape of its input.

    On a CPU, weights become constants of the program (freezing) and are packed for matrix products,
    and the program of one of our models is kept for the next run (see `KeptPrograms`). On other
    devices, kernels are autotuned, CUDA graphs are used where possible, and PyTorch's compiler
    keeps what it has compiled (see `compiler_cache`). Weights must not change afterwards.

    Args:
        function: A model, a method of it, or a function that calls it.
        device: Where it runs.
        model: Our model that the function calls; None for one of another library.
    """
    if device.type == "cpu":
        return _compile_frozen(function) if model is None else KeptPrograms(function, model)
    compiler_cache.use()
    return torch.compile(function, dynamic=False, mode="max-autotune")


def compile_for_training(
    function: Callable[..., Any], *, fullgraph: bool = False
) -> Callable[..., Any]:
    """Return the function compiled for training on inputs of one shape."""
    compiler_cache.use()
    return torch.compile(function, dynamic=False, fullgraph=fullgraph)


def compile_in_place(module: nn.Module, *, dynamic: bool | None = None) -> None:
    """Let a module call its compiled forward pass, which is one graph, for training.

    Args:
        module: The module.
        dynamic: See `torch.compile`.
    """
    compiler_cache.use()
    module.compile(fullgraph=True, dynamic=dynamic)


def compile_blocks(model: Encoder) -> None:
    """Let each block of a model call its compiled forward pass, for training under FSDP, whose
    collectives between blocks cannot be part of a graph.

    Blocks of the same shape share a program. Activation checkpointing moves into the programs:
    around a compiled block it would see none of its operations, and `selective` would keep none of
    their results. A copy of the model is not compiled, and recomputes its own blocks.
    """
    kind = model.grad_checkpointing
    blocks = (*model.blocks, *getattr(model, "decoder_blocks", ()))
    # All blocks have the code of one class, and PyTorch limits the programs for each code.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, PROGRAMS * len(blocks))
    for block in blocks:
        if kind:
            block.forward = _Recomputing(kind, block)
        compile_in_place(block, dynamic=False)
    model.set_grad_checkpointing(False)


class _Recomputing:
    """The forward pass of a block, with activation checkpointing.

    It holds the block, not its bound method: `deepcopy` would keep that of the original.
    """

    def __init__(self, kind: Checkpointing, block: nn.Module) -> None:
        self.kind, self.block, self.function = kind, block, type(block).forward

    def __call__(self, *arguments: Any) -> torch.Tensor:
        forward = functools.partial(self.function, self.block)
        if not torch.is_grad_enabled():
            return forward(*arguments)
        return recompute(self.kind, forward, *arguments)


def _compile_frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor import config as inductor

    compiled = torch.compile(function, dynamic=False)

    def frozen(*args: Any, **kwargs: Any) -> Any:
        # As an option of torch.compile, `freezing` would come too late: tracing already reads it.
        with inductor.patch(freezing=True):
            return compiled(*args, **kwargs)

    return frozen


class KeptPrograms:
    """A function of a model on the CPU, with a compiled program for each signature of its arguments
    that the next run finds on disk.

    Without a C++ compiler, programs that are not on disk are replaced by the function itself, which
    a message says.

    Args:
        function: A model, a method of it, or a function that calls it.
        model: The model. Its weights must not change.
        cache: Where programs are kept.

    Raises:
        UsageError: See `program_cache.size_limit`.
    """

    def __init__(
        self, function: Callable[..., Any], model: nn.Module, cache: ProgramCache | None = None
    ) -> None:
        self.function, self.model = function, model
        if cache is None:
            compiler_cache.hold()
        self.cache = ProgramCache() if cache is None else cache
        self._programs: dict[object, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns.

        Raises:
            DeviceError: The compiler fails.
        """
        signature = signature_of((args, kwargs))
        program = self._programs.get(signature)
        if program is None:
            with self._lock:
                program = self._programs.get(signature) or self._make(args, kwargs)
                self._programs[signature] = program
        return program(*args, **kwargs)

    def _make(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """Return the program for some arguments, from the disk or from the compiler."""
        options = {**aot_package.OPTIONS, "code": _code_of(self.function)}
        key = program_key(self.model, _name_of(self.function), (args, kwargs), options)
        if key is None:
            log.info("this model has layers of its own: its program is not kept for the next run")
            return _compile_frozen(self.function)
        start = time.perf_counter()
        found = self.cache.find(key)
        if found is not None:
            with contextlib.suppress(RuntimeError, OSError):
                program = aot_package.load_package(found)
                log.debug("%s was loaded in %.1f s", found, time.perf_counter() - start)
                return program
            log.warning("%s cannot be loaded: the program is compiled again", found)
        if not aot_package.has_compiler():
            log.warning(
                "there is no C++ compiler for --compile: the model runs uncompiled; "
                "install one, such as g++, or name it in the variable CXX"
            )
            return self.function
        content = self._compile(args, kwargs)
        log.debug("compiled in %.1f s", time.perf_counter() - start)
        path = self.cache.add(key, content)
        if path is not None:
            with contextlib.suppress(RuntimeError, OSError):  # another process has removed it
                return aot_package.load_package(path)
        return aot_package.load_package(content)

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> memoryview:
        module = _Module(self.function, self.model).eval()
        # The compiler needs tensors that are not of inference mode.
        with torch.inference_mode(False), torch.no_grad(), quiet_exporters(), cpu.stays_here():
            example = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
            exported = torch.export.export(module, *example, strict=False)
            return aot_package.compile_package(exported, {})


class _Module(nn.Module):
    """A function of a model as a module, which is what can be exported."""

    def __init__(self, function: Callable[..., Any], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._call = (function,)  # in a tuple, so that a model is not registered a second time

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call[0](*args, **kwargs)


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", "forward"))


def _code_of(function: Callable[..., Any]) -> str:
    """Return the code of a function, which may lie outside of the packages that the key knows."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return "" if code is None else f"{code.co_code.hex()} {code.co_names}"


@contextlib.contextmanager
def translate_compile_errors() -> Iterator[None]:
    """Convert errors of torch.compile to a DeviceError. Running out of memory is none of them."""
    try:
        yield
    except RuntimeError as error:
        from_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if not from_compiler or is_out_of_memory(error):
            raise
        raise DeviceError(
            f"torch.compile failed ({type(error).__name__})",
            "install a C++ compiler (or Triton on a GPU), or leave out --compile",
        ) from error
