"""Print the SHA-256 of the released .pth files, as lines for `sha256` in zoo.yaml.

    python -m tests.checksums                      # all files: 15 GB
    python -m tests.checksums hiera_tiny_224       # those of some models

The files are downloaded as users download them, to torch.hub's cache, and checked by the CRCs that
they hold. Run this on a network that you trust, and compare with the lines of somebody else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from hiera_core import zoo
from hiera_core.weights import download, download_record
from hiera_core.weights.integrity import check_weights_file


def checksums(models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the SHA-256 of each .pth file of some models, or of all models."""
    entries = [zoo.get(name) for name in models or zoo.names()]
    files = {found.file for entry in entries for found in entry.checkpoints.values() if found.file}
    for file in sorted(files):
        path = download.from_url(download.url_of(file), check=check_weights_file).weights
        yield file, download_record.sha256_of(path)


if __name__ == "__main__":
    for file, checksum in checksums(sys.argv[1:]):
        print(f"  {file}: {checksum}", flush=True)
