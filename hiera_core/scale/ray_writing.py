"""The last step in Ray's workers: rows to files. It imports no torch, because Ray starts a new
process for many of these tasks."""

from __future__ import annotations

import json
from typing import Any

from .done_rows import Facts
from .row_folder import RowFolder

SHOWN_ERRORS = 5  # of each file, for messages
# Columns with figures, and with what the rows depend on. They are not written.
BUSY, WAITED, SIZE, FACTS = "_busy", "_waited", "_size", "_facts"


def write_rows(folder: RowFolder, table: Any) -> Any:
    """Write rows, and return one row about them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    facts: Facts = {}
    for one in pc.unique(table[FACTS]).to_pylist():
        facts |= json.loads(one)
    figures = {name: pc.sum(table[name]).as_py() for name in (BUSY, WAITED, SIZE)}
    rows = table.drop_columns([BUSY, WAITED, SIZE, FACTS])
    written = folder.write(rows, facts)
    failed = rows.filter(pc.equal(rows["status"], "error"))
    errors = [
        f"{row['input']}: {'; '.join(filter(None, (row['error_message'], row['error_hint'])))}"
        for row in failed.slice(0, SHOWN_ERRORS).to_pylist()
    ]
    known = {
        "rows": rows.num_rows,
        "failed": failed.num_rows,
        "written": written,
        "errors": errors,
        **{name.strip("_"): value for name, value in figures.items()},
    }
    number, seconds = pa.int64(), pa.float64()
    counts = [("rows", number), ("failed", number), ("written", number), ("size", number)]
    figures_of_time = [("busy", seconds), ("waited", seconds)]
    schema = pa.schema([*counts, *figures_of_time, ("errors", pa.list_(pa.string()))])
    return pa.Table.from_pylist([known], schema)
