"""Files and folders of `hiera features`: what -o, --save-as and --visualize name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from hiera_core.data import sources
from hiera_core.errors import UsageError
from hiera_core.places.uploads import Upload

from ..feature_options import SaveAs
from .claims import claim_file, claim_folder, claim_part_of_folder
from .remote_outputs import is_file_name, open_file, open_folder

PLAIN_ARRAY = ".npy"
FEATURE_FILES = (".safetensors", ".npz", ".parquet", PLAIN_ARRAY)
PICTURES = (".png",)
PRINTED = ("jsonl", "json", "csv")  # formats that are only printed


@dataclass(frozen=True)
class FeatureOutputs:
    """Where the features and the pictures of a run go.

    Args:
        features: Value of --output: a file or a folder, or None.
        is_file: Whether that is a file.
        pictures: Value of --visualize: a folder or a picture, or None.
        is_picture: Whether that is a picture.
        upload: Sends the features to a remote place; None if they stay here. `features` is then
            their file or folder on this machine.
    """

    features: Path | None
    is_file: bool
    pictures: Path | None
    is_picture: bool
    upload: Upload | None = None

    @classmethod
    def parse(
        cls, output: Path | None, save_as: SaveAs | None, visualize: Path | None
    ) -> FeatureOutputs:
        """Return what the options name.

        Raises:
            UsageError: A path looks like a file of an unknown format, or that of --output is not
                the format of --save-as.
        """
        hint = "make it first or give --save-as"
        is_picture = visualize is not None and _is_file(visualize, PICTURES, "make it first")
        if output is None:
            return cls(None, False, visualize, is_picture)
        is_known = output.suffix.lower() in FEATURE_FILES
        is_file = (is_known or save_as is None) and _is_file(output, FEATURE_FILES, hint)
        if is_file and save_as is not None and output.suffix.lower() != f".{save_as}":
            raise UsageError(
                f"{output.name!r} is not a {save_as} file", "leave out --save-as, or name a folder"
            )
        return cls(output, is_file, visualize, is_picture)

    @classmethod
    @contextlib.contextmanager
    def remote(
        cls,
        url: str,
        save_as: SaveAs | None,
        visualize: Path | None,
        *,
        overwrite: bool,
        prefix: str,
        check: Callable[[Sequence[str], str], None],
    ) -> Iterator[FeatureOutputs]:
        """Yield what the options name, if the features go to a remote place.

        Args:
            url, save_as, visualize, overwrite: The values of the options.
            prefix, check: See `remote_outputs.open_file`.

        Raises:
            UsageError, OutputError: See `parse`, `open_file` and `open_folder`.
        """
        ending = Path(url.rpartition("/")[2]).suffix.lower()
        if ending in FEATURE_FILES or (save_as is None and is_file_name(url, FEATURE_FILES)):
            with open_file(url, overwrite, prefix, check if prefix else None) as (path, upload):
                yield replace(cls.parse(path, save_as, visualize), upload=upload)
        else:
            with open_folder(url, overwrite, prefix, check) as upload:
                yield replace(cls.parse(upload.folder, save_as, visualize), upload=upload)

    @property
    def shown(self) -> str:
        """Where the features are, for messages."""
        assert self.features is not None
        return str(self.features) if self.upload is None else self.upload.name_of(self.features)

    @property
    def array(self) -> Path | None:
        """The `.npy` file to write, if there is one."""
        if self.features is None or not self.is_file:
            return None
        return self.features if self.features.suffix.lower() == PLAIN_ARRAY else None

    def format_name(self, save_as: SaveAs | None) -> str:
        """Return the format of the features' file or files: `npz`, for example."""
        if self.is_file and self.features is not None:
            return self.features.suffix.lower().removeprefix(".")
        return save_as or SaveAs.safetensors

    def check(
        self, inputs: Sequence[str], stages: Sequence[int] | None, attention: int | None
    ) -> None:
        """Check that what is written to a single array or picture is only one.

        Args:
            inputs: The inputs; none stand for the sample.
            stages: Stages whose features are returned; None for all, () for the embedding or the
                last map.
            attention: Number of a block, if its attention weights are returned.

        Raises:
            UsageError: There may be several inputs, there are several features for one array, or a
                picture would replace the input.
        """
        names_one = not inputs or (len(inputs) == 1 and sources.names_one(inputs[0]))
        has_one_feature = stages is not None and len(stages) <= 1 and attention is None
        if self.array is not None and not (names_one and has_one_feature):
            what = "features" if names_one else "inputs"
            raise UsageError(
                f"{self.array.name!r} holds one array, and there are several {what}",
                "write a .npz, .safetensors or .parquet file, or a folder",
            )
        if not self.is_picture or self.pictures is None:
            return
        if not names_one:
            raise UsageError(
                f"{self.pictures.name!r} is one picture, and there are several inputs",
                "name a folder",
            )
        if any(_is_same(self.pictures, Path(name)) for name in inputs):
            raise UsageError("the picture would replace the input", "choose another name")

    def claim(
        self, context: typer.Context, *, overwrite: bool, may_exist: bool, prefix: str = ""
    ) -> FeatureOutputs:
        """Hold the locks until the command ends, and return these outputs with links resolved.

        Args:
            context: The context of the command.
            overwrite: Whether files may exist.
            may_exist: Whether folders may hold files.
            prefix: Begin of the names of files in the folder of features, if it is shared.

        Raises:
            UsageError: See `claim_file` and `claim_folder`.
        """
        features, pictures = self.features, self.pictures
        if self.upload is not None:
            pass  # nobody else writes to its temporary folder, and remote places have no locks
        elif features is not None and self.is_file:
            features = context.with_resource(claim_file(features, overwrite))
        elif features is not None and prefix:
            context.with_resource(claim_part_of_folder(features, prefix, may_exist))
        elif features is not None:
            context.with_resource(claim_folder(features, may_exist, "features"))
        if pictures is not None and self.is_picture:
            pictures = context.with_resource(claim_file(pictures, overwrite))
        elif pictures is not None and (
            features is None or pictures.resolve() != features.resolve()
        ):
            context.with_resource(claim_folder(pictures, may_exist))
        return replace(self, features=features, pictures=pictures)


def _is_same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _is_file(path: Path, endings: Sequence[str], or_folder: str) -> bool:
    """Return whether a path names a file with one of the endings; otherwise it names a folder.

    Raises:
        UsageError: It has another ending.
    """
    if path.is_dir() or not path.suffix:
        return False
    if path.suffix.lower() in endings:
        return True
    text = path.suffix.lower().removeprefix(".")
    printed = f"; or print them: -f {text} > {path.name}" if text in PRINTED else ""
    raise UsageError(
        f"unknown file extension in {path.name!r}",
        f"end it in {', '.join(endings)}; or, for a folder, {or_folder}"
        f"{printed if endings is FEATURE_FILES else ''}",
    )
