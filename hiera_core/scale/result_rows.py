"""Records as rows of Parquet: one row for each input, also for those that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError
from ..records import Record, error_json

if TYPE_CHECKING:
    import pyarrow as pa

IdType = Literal["none", "number", "text"]
EXTRA = "pip install 'hiera-toolkit[parquet]'"


def check_pyarrow() -> None:
    """Check that pyarrow is installed.

    Raises:
        UsageError: It is not.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UsageError("Parquet needs pyarrow, which is not installed", EXTRA) from error


@dataclass(frozen=True)
class RowLayout:
    """The columns of the rows of a run.

    `index` is the position of the input among all of them, `id` what a manifest calls it. `topk`
    and `segments` are as in JSON. A feature is a list of float32, null if the input failed.

    Args:
        features: Names of the features; empty for classes.
        id_type: Type of `id`; `none` if there is no such column.
    """

    features: tuple[str, ...] = ()
    id_type: IdType = "none"

    def schema(self) -> pa.Schema:
        """Return the types of all columns, which are the same in every file."""
        import pyarrow as pa

        text = pa.string()
        fields: list[tuple[str, Any]] = [("index", pa.int64())]
        if self.id_type != "none":
            fields.append(("id", pa.int64() if self.id_type == "number" else text))
        fields += [(name, text) for name in ("input", "status", "kind", "model")]
        if self.features:
            fields += [(name, pa.list_(pa.float32())) for name in self.features]
        else:
            one = pa.struct([("id", pa.int64()), ("label", text), ("prob", pa.float64())])
            times = [("start", pa.float64()), ("end", pa.float64())]
            fields.append(("topk", pa.list_(one)))
            fields.append(("segments", pa.list_(pa.struct([*times, ("topk", pa.list_(one))]))))
        counts = [(name, pa.int64()) for name in ("frames", "used", "damaged", "views")]
        rates = [("duration", pa.float64()), ("fps", pa.float64())]
        fields += [("notes", pa.list_(text)), ("video", pa.struct([*rates, *counts]))]
        fields += [(f"error_{key}", text) for key in ("type", "message", "hint")]
        return pa.schema(fields)

    def table(self, records: Sequence[Record]) -> pa.Table:
        """Return a row for each record.

        Raises:
            UsageError: A video has several vectors.
        """
        import pyarrow as pa

        return pa.Table.from_pylist([self._row(record) for record in records], self.schema())

    def _row(self, record: Record) -> dict[str, Any]:
        values: dict[str, Any] = dict(record.to_json())
        error = None if record.error is None else error_json(record.error)
        for key in ("type", "message", "hint"):
            values[f"error_{key}"] = None if error is None else dict(error)[key]
        values["input"] = printable(record.input)
        if self.id_type == "text" and record.id is not None:
            values["id"] = str(record.id)
        for name in self.features:
            found = None if record.result is None else record.result[name]
            if found is not None and found.dim() != 1:
                raise UsageError(
                    "a row holds one vector for each feature, not maps or segments",
                    "write them with --save-as",
                )
            values[name] = None if found is None else found.numpy()
        return values


def printable(name: str) -> str:
    """Return a name as text: bytes of a file name that are not UTF-8 are written as `\\xff`."""
    return name.encode("utf-8", "backslashreplace").decode()
