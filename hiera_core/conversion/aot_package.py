"""AOTInductor packages: programs that are compiled when they are written, not when they start."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..device import is_out_of_memory
from ..errors import DeviceError, UsageError
from ..models.cpu import HAS_ONEDNN
from ..weights.files import open_deferring_errors

# Weights become constants, which the compiler packs for matrix products. Headers are not compiled
# in advance, because the cache that would hold them is removed.
OPTIONS: dict[str, Any] = {
    "freezing": True,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
}
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
UNCHECKED = (
    "the package does not check its inputs: others than input_shapes names give wrong numbers or a "
    "crash; with AOTI_RUNTIME_CHECK_INPUTS=1 in its environment it refuses them"
)
NEEDS_NO_COMPILER = "or use pt2 or onnx, which need no compiler"


def check_compiler() -> None:
    """Check that there is a C++ compiler, before anything is computed.

    Raises:
        UsageError: PyTorch finds none.
    """
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError as error:
        raise UsageError(
            "aoti needs a C++ compiler, and none is found",
            f"install one, such as g++, or name it in the variable CXX; {NEEDS_NO_COMPILER}",
        ) from error


def compile_package(exported: Any, path: Path, metadata: dict[str, str]) -> None:
    """Compile an exported program for this machine's CPU, and write the package.

    Args:
        exported: The program, with constant sizes.
        path: The file, whose name ends in .pt2.
        metadata: Text that `get_metadata` of the loaded package returns.

    Raises:
        DeviceError: The compiler fails.
        OSError: The file cannot be written.
    """
    options = {**OPTIONS, "aot_inductor.metadata": metadata}
    content = io.BytesIO()
    use_onednn(exported)
    try:
        with _temporary_cache():
            torch._inductor.aoti_compile_and_package(
                exported, package_path=content, inductor_configs=options
            )
    except Exception as error:  # the compiler raises errors of many types
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        raise DeviceError(
            f"AOTInductor cannot compile the program ({type(error).__name__})",
            f"check the C++ compiler, {NEEDS_NO_COMPILER}",
        ) from error
    with open_deferring_errors(path) as file:
        file.write(content.getbuffer())


def use_onednn(exported: Any) -> None:
    """Replace the linear layers of a program by oneDNN's, each with a GELU that follows it.

    The model itself does so where it runs, see models/cpu.py: on some processors the library that
    the compiler would call takes twice as long. Only products of float32 are replaced.
    """
    if not HAS_ONEDNN:
        return
    graph = exported.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.linear.default or not _is_plain_product(node):
            continue
        last, attr = node, "none"
        if len(node.users) == 1:
            user = next(iter(node.users))
            exact = user.kwargs.get("approximate", "none") == "none" and len(user.args) == 1
            if user.target is torch.ops.aten.gelu.default and exact:
                last, attr = user, "gelu"
        bias = node.args[2] if len(node.args) > 2 else None
        with graph.inserting_before(node):
            arguments = (*node.args[:2], bias, attr, [], "none" if attr == "gelu" else "")
            new = graph.call_function(torch.ops.mkldnn._linear_pointwise.default, arguments)
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for done in dict.fromkeys((last, node)):
            graph.erase_node(done)


def _is_plain_product(node: Any) -> bool:
    """Return whether oneDNN can replace a linear layer. The compiler fails if it sees a sum whose
    first term is oneDNN's product."""
    value, add = node.args[0].meta["val"], torch.ops.aten.add.Tensor
    is_summed = any(user.target is add and user.args[0] is node for user in node.users)
    return value.dtype is torch.float32 and value.dim() > 1 and not is_summed


@contextlib.contextmanager
def _temporary_cache() -> Iterator[None]:
    """Let the compiler keep its files, which hold all weights, in a folder that is removed."""
    before = os.environ.get(CACHE_VARIABLE)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[CACHE_VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[CACHE_VARIABLE]
            else:
                os.environ[CACHE_VARIABLE] = before
