"""AOTInductor packages: programs that are compiled when they are written, not when they start."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree

from ..device import is_out_of_memory
from ..errors import DeviceError
from ..models.cpu import HAS_ONEDNN

# Weights become constants, which the compiler packs for matrix products. Headers are not compiled
# in advance, because the cache that would hold them is removed.
OPTIONS: dict[str, Any] = {
    "freezing": True,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
}
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
NEEDS_NO_COMPILER = "or use pt2 or onnx, which need no compiler"


def has_compiler() -> bool:
    """Return whether PyTorch finds a C++ compiler."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except RuntimeError:
        return False
    return True


def compile_package(exported: Any, metadata: dict[str, str]) -> memoryview:
    """Compile an exported program for this machine's CPU, and return the content of the package.

    Args:
        exported: The program, with constant sizes.
        metadata: Text that `get_metadata` of the loaded package returns.

    Raises:
        DeviceError: The compiler fails.
        OSError: The disk is full.
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
    return content.getbuffer()


def load_package(package: Path | memoryview) -> Callable[..., Any]:
    """Return the program in a package that this process or user has written. It runs its code.

    Args:
        package: A file, or the content of one.

    Raises:
        RuntimeError: PyTorch cannot load it.
    """
    if isinstance(package, Path):
        return Package(package)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder, "program.pt2")
        path.write_bytes(package)
        return Package(path)  # PyTorch has unpacked it when this returns


class Package:
    """A loaded program. `torch._inductor.aoti_load_package` does the same, but imports the whole
    compiler, which takes seconds, and reads the structure of the arguments again at every call."""

    def __init__(self, path: Path) -> None:
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        self._arguments, self._results = map(_pytree.treespec_loads, self._loader.get_call_spec())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, structure = _pytree.tree_flatten((args, kwargs))
        if structure != self._arguments:
            raise TypeError(f"the program takes {self._arguments}, not {structure}")
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return _pytree.tree_unflatten(self._loader.boxed_run(tensors), self._results)


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
