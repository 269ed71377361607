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

# Weights become constants, which the compiler packs in the order that oneDNN reads. Headers
# are not compiled in advance, because the cache that would hold them is removed.
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
