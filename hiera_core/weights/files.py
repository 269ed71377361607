"""Read checkpoint files without running code in them, and write them atomically."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from ..atomic import atomic_file
from ..errors import CheckpointError, first_line
from ..plain_data import decode_text, is_utf8, to_json
from .integrity import (
    PICKLE_SIGNATURE,
    DamagedFile,
    as_unreadable,
    check_weights_file,
    is_safetensors,
    weight_map,
)
from .state_dict import NumPyValue, find_state_dict, safe_types

JSON_MAX_BYTES = 64 << 20
WRITE_BYTES = 1 << 19  # bytes that are written at a time; they fit the cache of a core
# Key of the extras, {"config": ..., "card": ...}. A single file holds under this key what a folder
# holds in config.json and hiera.json. Other libraries ignore it.
EXTRAS = "hiera"
_ALLOWING = threading.Lock()
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_tensors(path: Path, only: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a .safetensors or .pth file by name; see `read`."""
    return read(path, only)[0]


def read(
    path: Path, only: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a .safetensors or .pth file. Pickles are read with `weights_only`, so no code runs.

    Args:
        path: The file. Its format is detected from its content, not from its extension.
        only: Names of the tensors that are needed; others may be left out. The file as a whole is
            not checked then, so that a caller can read a file in parts.

    Returns:
        The tensors by name, memory-mapped if the format allows it, and the extras that this
        toolkit wrote with them: `config` and `card`.

    Raises:
        DamagedFile: The file is truncated or damaged, or not a checkpoint.
        CheckpointError: The file cannot be read, is unsafe, or is not a dictionary of dense
            tensors.
    """
    try:
        if only is None:
            check_weights_file(path)
        if is_safetensors(path):
            if not is_utf8(path):  # the library of safetensors opens no other names
                raise CheckpointError(f"the path {str(path)!r} is not valid UTF-8", "rename it")
            tensors, extras = _read_safetensors(path, only)
        else:
            tensors, extras = _read_pickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects or code, not only tensors; nothing of it was run",
            _cure_for_objects(error),
        ) from error
    except (MemoryError, CheckpointError):
        raise
    except OSError as error:
        raise as_unreadable(path, error) from error
    except Exception as error:  # readers raise many types on damaged files
        raise DamagedFile(path, f"is truncated or damaged ({first_line(error)})") from error
    return _check_dense(path, tensors), _valid_extras(extras)


def _cure_for_objects(error: pickle.UnpicklingError) -> str:
    """Return what the owner of a file with Python objects can do, with the object's name."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f" (it asks for {found[1]})" if found else ""
    return (
        f"get it as .safetensors, or from a source that saves plain tensors{what}; if it is yours: "
        "torch.save(model.state_dict(), FILE)"
    )


def check_weights(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that weights are finite and floating point.

    Raises:
        CheckpointError: Tensors hold NaN or infinity, integers, or 8-bit floats. The message names
            the first of them.
    """
    for name, tensor in state.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}",
                "give unquantised weights",
            )
    bad = [name for name, tensor in state.items() if not _is_finite(tensor)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{source} has NaN or infinite weights in {', '.join(bad[:3])}{more}",
            "use another file: in this one, training diverged or the data is damaged",
        )


def write_safetensors(
    path: Path, state: Mapping[str, torch.Tensor], extras: Mapping[str, Any] | None = None
) -> None:
    """Write tensors as a .safetensors file, atomically.

    Args:
        path: The file.
        state: Tensors by name.
        extras: `config` and `card`, which `read` returns.
        key: Key of the tensors. Meta's files of SAM 2 have `model`.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # transformers and the hub expect the format in the metadata.
    metadata = {"format": "pt", **({EXTRAS: json.dumps(extras)} if extras else {})}
    with atomic_file(path) as temporary:
        try:
            save_file(_separate(state), temporary, metadata=metadata)
        except SafetensorError as error:
            raise as_os_error(error) from error
        _sort_metadata(temporary)


def as_os_error(error: Exception) -> OSError:
    """Return an error of safetensors' writer as the OSError that its text reports."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
        return OSError(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1])))


def _separate(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous tensors that share no memory. Only tensors that need it are copied."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            tensors[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return tensors


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a .safetensors file, so that equal models give equal files: safetensors
    writes it in random order. The header keeps its length."""
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def write_pickle(
    path: Path,
    state: Mapping[str, torch.Tensor],
    extras: Mapping[str, Any] | None = None,
    key: str = "model_state",
) -> None:
    """Write tensors atomically in the reference's format: `torch.save({"model_state": ...})`.

    Each tensor gets a storage of its own, over the same memory. Otherwise a slice of a
    memory-mapped file would be saved with all of that file.

    Args:
        path: The file.
        state: Tensors by name.
        extras: `config` and `card`, which `read` returns.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    plain = {name: _own_storage(tensor) for name, tensor in state.items()}
    content = {key: plain, **({EXTRAS: dict(extras)} if extras else {})}
    with atomic_file(path) as temporary, open_deferring_errors(temporary) as file:
        torch.save(content, file)


@contextlib.contextmanager
def open_deferring_errors(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for torch's archive writers, and raise write errors at the end of the block.

    If a write fails, for example because the disk is full, these writers abort the process. So
    every write seems to succeed, and the first error is kept until they are done.
    """
    with path.open("wb") as file:
        deferring = _DeferringFile(file)
        yield cast(IO[bytes], deferring)
        file.flush()
        if deferring.error is not None:
            raise deferring.error


class _DeferringFile(io.RawIOBase):
    """A file that keeps the first write error in `error`, and ignores later writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.position = file, 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:  # torch.export seeks to the start when it is done
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.position += count
        try:
            if self.error is None:
                self._write(data)
        except OSError as error:
            self.error = error
        return count

    def tell(self) -> int:
        return self.position

    def _write(self, content: Any) -> None:
        """Write in small chunks that are copied first.

        Writing a large chunk directly from a memory-mapped file, or from memory that is new to a
        virtual machine, would cost page faults inside the kernel's write.
        """
        data = memoryview(content)
        while data.nbytes:
            data = data[self.file.write(bytes(data[:WRITE_BYTES])) :]


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(_bytes_of(tensor)).view(tensor.dtype).reshape(tensor.shape)


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Return the bytes as a uint8 array. It shares the memory of a contiguous tensor on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with a JSON object.

    Raises:
        DamagedFile: It holds something else.
        CheckpointError: It cannot be read.
    """
    try:
        if path.stat().st_size > JSON_MAX_BYTES:
            raise DamagedFile(path, f"is larger than {JSON_MAX_BYTES >> 20} MiB")
        value = json.loads(decode_text(path.read_bytes()))
    except OSError as error:
        raise as_unreadable(path, error) from error
    except (ValueError, RecursionError) as error:  # RecursionError: a file of open brackets
        raise DamagedFile(path, f"cannot be read ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise DamagedFile(path, "does not hold a JSON object")
    return value


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the name of the file that holds each tensor, as an index says; see `weight_map`.

    Raises:
        DamagedFile: It is no index, or a wrong one.
        CheckpointError: It cannot be read.
    """
    value = read_json(index)
    try:
        return weight_map(value)
    except ValueError as error:
        raise DamagedFile(index, str(error)) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    with atomic_file(path) as temporary:
        temporary.write_text(to_json(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_safetensors(
    path: Path, only: Collection[str] | None
) -> tuple[dict[str, torch.Tensor], Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = only or file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        return tensors, json.loads((file.metadata() or {}).get(EXTRAS, "{}"))


@contextlib.contextmanager
def _allowing(allowed: Collection[Any]) -> Iterator[None]:
    """Let torch read these types from pickles within the block.

    torch has one list for the whole process. So only one thread at a time is in the block, and what
    the program allowed before stays allowed afterwards.
    """
    with _ALLOWING:
        before = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals([t for t in allowed if t not in before]):
            yield


def _read_pickle(path: Path) -> tuple[dict[str, Any], Any]:
    with path.open("rb") as file:
        zipped = not file.read(1).startswith(PICKLE_SIGNATURE)
        file.seek(0)
        # Only torch's zip format can be memory-mapped; the older one is read into memory. A path
        # that ends in .safetensors would be read as such, whatever the file holds.
        mapped = zipped and path.suffix != ".safetensors"
        with _allowing(safe_types()):
            source = path if mapped else file
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped or None)
    extras = loaded.get(EXTRAS) if isinstance(loaded, dict) else None
    state = find_state_dict(loaded)
    if state is None:
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors",
            "save a state dict",
        )
    return {name: value for name, value in state.items() if name != EXTRAS}, extras


def _valid_extras(extras: Any) -> dict[str, Any]:
    """Return the `config` and the `card` of a file's extras, if these are dictionaries."""
    items = extras.items() if isinstance(extras, dict) else ()
    return {k: v for k, v in items if k in ("config", "card") and isinstance(v, dict)}


def _check_dense(path: Path, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors, detached.

    Raises:
        CheckpointError: A name is not a string, or a value is not a plain dense tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: the key {name!r} is no name", "save a state dict")
        if isinstance(tensor, NumPyValue):
            raise CheckpointError(
                f"{path}: {name!r} is of NumPy, not a tensor",
                "save a state dict of tensors (torch.from_numpy)",
            )
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor", "save a state dict"
            )
        if not _is_dense(tensor):
            raise CheckpointError(
                f"{path}: {name!r} is not a plain dense tensor", "save it dense and unquantised"
            )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether this is a plain tensor in memory that holds each of its values.

    An expanded tensor (stride 0) holds few values, and can pretend to have billions.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_nested:
        return False
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _is_finite(tensor: torch.Tensor) -> bool:
    # The sum is fast. If it is finite, all elements are. If not, it may only have overflowed.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
