"""Fuzz the readers of files that other people made, guided by coverage.

    python -m tests.campaigns.fuzz TARGET [--seconds 600] [--found DIR]

A finding is an exception that is not a HieraError: a user would see "unexpected error". The input
that causes it is written to DIR, and belongs to `tests/campaigns/found/TARGET/` once it is mended:
tests/campaigns/test_fuzz.py reads all of these in the default test run. Needs `pip install
atheris` (CPython 3.11 to 3.13 on Linux).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

FOUND = Path(__file__).with_name("found")


def read_sources(content: bytes, path: Path) -> None:
    """Content of a list of inputs (`@list.txt`, or standard input)."""
    from hiera_core.data import sources

    path.write_bytes(content)
    for source in sources.expand([f"@{path}"]):
        assert source.name is not None


def read_tar(content: bytes, path: Path) -> None:
    """Tar shard of a data set."""
    from hiera_core.data import datasets

    tar = path.with_suffix(".tar")
    tar.write_bytes(content)
    datasets.open_dataset(str(tar), labelled=True)


def read_labels(content: bytes, path: Path) -> None:
    """File of --labels."""
    from hiera_core.zoo import labels

    path.write_bytes(content)
    labels.read_labels(path)


def read_list(content: bytes, path: Path) -> None:
    """List of a data set: CSV, TSV or `path label` lines."""
    from hiera_core.data import datasets

    listed = path.with_suffix(".csv")
    listed.write_bytes(content)
    datasets.open_dataset(str(listed), labelled=True)


def read_weights(content: bytes, path: Path) -> None:
    """Checkpoint: .safetensors or .pth, told apart by content."""
    from hiera_core.weights import files

    path.write_bytes(content)
    files.read(path)


def read_recipe(content: bytes, path: Path) -> None:
    """Recipe of a training run."""
    from hiera_core.training import recipe_reader

    recipe = path.with_suffix(".yaml")
    recipe.write_bytes(content)
    recipe_reader.read_recipe(recipe)


def read_features(content: bytes, path: Path) -> None:
    """Shard of features, which --resume reads."""
    from hiera_core.inference import feature_formats

    for ending in (".safetensors", ".npz"):
        shard = path.with_suffix(ending)
        shard.write_bytes(content)
        feature_formats.read_metadata(shard)


def read_picture(content: bytes, path: Path) -> None:
    """Picture, from memory."""
    from hiera_core.data import image_reader

    image_reader.open_image(content, max_pixels=1 << 20)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "sources": read_sources,
    "tar": read_tar,
    "labels": read_labels,
    "list": read_list,
    "safetensors": read_weights,
    "pth": read_weights,
    "recipe": read_recipe,
    "features": read_features,
    "picture": read_picture,
}


def seeds(target: str) -> list[bytes]:
    """Return well-formed inputs of a target, from which the fuzzer starts."""
    import torch
    from PIL import Image
    from safetensors.torch import save

    out = io.BytesIO()
    if target == "tar":
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, content in (("a.png", b"\x89PNG"), ("a.cls", b"1"), ("b/c.jpg", b"")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return [out.getvalue()]
    if target == "pth":
        torch.save({"model_state": {"a.weight": torch.ones(2, 3)}, "epoch": 3}, out)
        old = io.BytesIO()
        torch.save({"a": torch.ones(2)}, old, _use_new_zipfile_serialization=False)
        return [out.getvalue(), old.getvalue()]
    if target == "picture":
        found = []
        for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
            file = io.BytesIO()
            Image.new("RGB", (4, 3), "red").save(file, format)
            found.append(file.getvalue())
        return found
    metadata = {"inputs": ["a"], "indices": [0], "shapes": {"a": [2]}, "kind": "image"}
    features = save({"a": torch.ones(1, 2)}, {"hiera": json.dumps(metadata)})
    texts = {
        "sources": b"a.png\nhttps://example.org/b.jpg\r\n/c d.mp4\n",
        "labels": b"cat\ndog\n",
        "list": b"path,label\na.png,1\nb.png,2\n",
        "safetensors": save({"a": torch.ones(2, 3)}, {"hiera": '{"config": {}}'}),
        "recipe": b"extends: hiera_nano_32\nschedule: {epochs: 3}\noptimizer:\n  lr: 1e-3\n",
        "features": features,
    }
    return [texts[target]]


def try_input(target: str, content: bytes, folder: Path) -> Exception | None:
    """Read one input. Return the exception that a user should never see, if there is one."""
    from hiera_core.errors import HieraError

    try:
        TARGETS[target](content, folder / "input")
    except HieraError:
        return None
    except Exception as error:
        return error
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--found", type=Path, default=Path("found"))
    options = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["hiera_core", "zipfile", "tarfile", "csv", "json"]):
        import hiera_core.data.datasets
        import hiera_core.data.image_reader
        import hiera_core.data.sources
        import hiera_core.inference.feature_formats
        import hiera_core.training.recipe_reader
        import hiera_core.weights.files
        import hiera_core.zoo.labels  # noqa: F401

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(options.target)):
        (corpus / str(number)).write_bytes(seed)
    kinds = set[str]()

    def one_input(content: bytes) -> None:
        error = try_input(options.target, content, folder)
        if error is None:
            return
        # One finding a place is enough: where the exception comes from in our own code.
        trace, place = error.__traceback__, ""
        while trace is not None:
            if "hiera_core" in trace.tb_frame.f_code.co_filename:
                place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        kind = f"{type(error).__name__} at {place}"
        if kind not in kinds:
            kinds.add(kind)
            options.found.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(content).hexdigest()[:12]
            (options.found / name).write_bytes(content)
            print(f"found: {kind}: {error} ({name})", flush=True)

    limits = [f"-max_total_time={options.seconds}", "-max_len=4096", "-rss_limit_mb=3000"]
    atheris.Setup(
        [sys.argv[0], str(corpus), *limits, "-timeout=20", "-print_final_stats=1"], one_input
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
