"""Checkpoint files: read without running code, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from ..atomic import atomic_file
from ..errors import CheckpointError, first_line

# Where the weights sit in a saved dictionary: the reference's, then common trainers'.
STATE_KEYS = ("model_state", "state_dict", "model", "state_dict_ema", "model_ema")
SAFETENSORS_MAX_HEADER = 100 << 20
WRITE_BYTES = 1 << 19  # at a time: fits a core's cache
# Where a file that is no folder of ours carries what lies beside the weights in one: config.json
# and hiera.json, as {"config": ..., "card": ...}. Other libraries pass over it.
EXTRAS = "hiera"
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_tensors(path: Path, only: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or .pth file by name: the first half of `read`."""
    return read(path, only)[0]


def read(
    path: Path, only: Collection[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a .safetensors or .pth file by name, memory-mapped where the format allows, and
    the extras that we wrote with them.

    The content decides, not the file's ending. Pickles are read with `weights_only`: nothing in
    the file runs. With `only`, other tensors than these may be left out.

    Raises:
        CheckpointError: damaged, unsafe, or no dictionary of plain dense tensors.
    """
    try:
        if is_safetensors(path):
            tensors, extras = _read_safetensors(path, only)
        else:
            tensors, extras = _read_pickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects or code, not only tensors; nothing of it was run",
            "get it as .safetensors, or from a source that saves plain tensors",
        ) from error
    except MemoryError:
        raise
    except CheckpointError:
        raise
    except Exception as error:  # readers raise many types on damaged files
        raise CheckpointError(
            f"{path} is truncated or damaged ({first_line(error)})", "fetch it again"
        ) from error
    return _check_dense(path, tensors), _plain_extras(extras)


def is_safetensors(path: Path) -> bool:
    """A length, then a JSON header."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and 0 < length < SAFETENSORS_MAX_HEADER


def check_weights(state: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise CheckpointError naming the first tensors that hold NaN or infinity, or that are in a
    number format weights do not come in (integers, 8-bit floats)."""
    for name, tensor in state.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{source}: {name} is {str(tensor.dtype).removeprefix('torch.')}",
                "give unquantised weights",
            )
    bad = [name for name, tensor in state.items() if not _finite(tensor)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"{source} has NaN or infinite weights in {', '.join(bad[:3])}{more}",
            "the training run that wrote it diverged, or the file is damaged: use another one",
        )


def write_safetensors(
    path: Path, state: Mapping[str, torch.Tensor], extras: Mapping[str, Any] | None = None
) -> None:
    """Write tensors as a .safetensors file, atomically.

    Args:
        path: The file.
        state: Tensors by name.
        extras: `config` and `card`, which `read` returns again.

    Raises:
        OutputError: The disk is full, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # transformers and the hub expect the format in the metadata.
    metadata = {"format": "pt", **({EXTRAS: json.dumps(extras)} if extras else {})}
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    with atomic_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # it reports a full disk this way
            raise OSError(str(error)) from error


def write_pickle(
    path: Path, state: Mapping[str, torch.Tensor], extras: Mapping[str, Any] | None = None
) -> None:
    """Write tensors as the reference's authors publish them: torch.save of {"model_state": ...}.

    Each tensor gets a storage of its own, over the same memory: a slice of a memory-mapped file
    would take the whole file with it.
    """
    plain = {name: _own_storage(tensor) for name, tensor in state.items()}
    content = {"model_state": plain, **({EXTRAS: dict(extras)} if extras else {})}
    with atomic_file(path) as temporary, open_deferring_errors(temporary) as file:
        torch.save(content, file)


@contextlib.contextmanager
def open_deferring_errors(path: Path) -> Iterator[IO[bytes]]:
    """A file for torch's archive writers, which end the process when a disk fills up under them:
    they are told that all is well, and the error is raised when they are done."""
    with path.open("wb") as file:
        patient = _Patient(file)
        yield cast(IO[bytes], patient)
        file.flush()
        if patient.error is not None:
            raise patient.error


class _Patient(io.RawIOBase):
    """Passes writes on; keeps the first error."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.at = file, 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:  # torch.export goes back to the start when it is done
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        self.at += count
        try:
            if self.error is None:
                self._write(data)
        except OSError as error:
            self.error = error
        return count

    def tell(self) -> int:
        return self.at

    def _write(self, content: Any) -> None:
        """Write small pieces through a buffer. Large pieces that are mapped to a file, or to memory
        that is new to a virtual machine, cost page faults inside the kernel's write."""
        data = memoryview(content)
        while data.nbytes:
            data = data[self.file.write(bytes(data[:WRITE_BYTES])) :]


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(_bytes_of(tensor)).view(tensor.dtype).reshape(tensor.shape)


def _bytes_of(tensor: torch.Tensor) -> Any:
    """A uint8 array of the same memory, where it is on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_safetensors(
    path: Path, only: Collection[str] | None
) -> tuple[dict[str, torch.Tensor], Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = only or file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
        return tensors, json.loads((file.metadata() or {}).get(EXTRAS, "{}"))


def _read_pickle(path: Path) -> tuple[dict[str, Any], Any]:
    with path.open("rb") as file:
        start = file.read(40)
    zipped = start.startswith(b"PK\x03\x04")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file", "run `git lfs pull`")
    if not start:
        raise EOFError("it is empty")
    if not zipped and not start.startswith(b"\x80"):  # a pickle's first byte
        raise CheckpointError(
            f"{path} is no checkpoint: it begins with {start[:12]!r}",
            "give a .safetensors file or one that torch.save wrote",
        )
    # Only the zip format can be mapped; the old one is read into memory.
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    extras = loaded.get(EXTRAS) if isinstance(loaded, dict) else None
    for key in STATE_KEYS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors",
            "save a state dict",
        )
    return {name: value for name, value in loaded.items() if name != EXTRAS}, extras


def _plain_extras(extras: Any) -> dict[str, Any]:
    """Those parts of a file's extras that are what they should be."""
    found = extras if isinstance(extras, dict) else {}
    return {k: v for k, v in found.items() if k in ("config", "card") and isinstance(v, dict)}


def _check_dense(path: Path, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: the key {name!r} is no name", "save a state dict")
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor", "save a state dict"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{path}: {name!r} is not a plain dense tensor", "save it dense and unquantised"
            )
    return {name.removeprefix("module."): t.detach() for name, t in tensors.items()}  # from DDP


def _finite(tensor: torch.Tensor) -> bool:
    """A sum is finite if all terms are; only a sum that is not (or overflows) needs a look."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
