"""Files and folders that appear under their final name only when complete."""

from .replacing import (
    TEMPORARY,
    atomic_destination,
    atomic_file,
    sync_folder,
    translate_write_errors,
)

__all__ = [
    "TEMPORARY",
    "atomic_destination",
    "atomic_file",
    "sync_folder",
    "translate_write_errors",
]
