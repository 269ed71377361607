"""Log of a run: JSON lines, the terminal (live table or log lines), TensorBoard, and curves."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import atomic_file, translate_write_errors
from ..errors import UsageError
from ..plain_data import to_json
from ..viz import charts
from .trackers.sender import Outcome
from .trackers.tracker import check_installed, open_trackers

log = logging.getLogger("hiera")
LOG_NAME, CURVES_NAME, TENSORBOARD = "log.jsonl", "curves.png", "tensorboard"
START: dict[str, Any] = {
    "event": "start",
    "step": 0,
}  # what the first event of a log holds, among other facts
# Values of a step that the terminal shows.
SHOWN = ("epoch", "loss", "lr", "grad_norm", "rate", "wait", "mfu", "elapsed", "eta", "memory")
MEASURED = {"val": "held out", "probe": "probe"}  # events of measurements, and what they are called
PROGRESS_S = 0.5  # seconds between the steps that the live table shows, if nothing is logged


@dataclass
class RunLog:
    """Log of a run. Each event is a JSON object with `step` and `event`: start, step, val, probe or
    bad.

    Args:
        folder: Folder of the run.
        steps: Number of steps in the run.
        unit: Unit of the views: "images" or "clips".
        active: False in all processes but the main process; the log then does nothing.
        live: Show a live table instead of log lines, if stderr is a terminal.
        track: Names of the trackers that also get the measurements.
        facts: What the trackers keep about the run, by dotted key.

    Raises:
        UsageError: The package of a tracker is not installed.
    """

    folder: Path
    steps: int
    unit: str = "images"
    active: bool = True
    live: bool = True
    track: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_installed(self.track)

    def open(self, step: int) -> None:
        """Open the log of a run that starts (`step` 0) or resumes after `step` steps.

        Events of later steps are removed; at step 0, all of them.

        Raises:
            OutputError: The log cannot be written.
        """
        if not self.active:
            return
        path = self.folder / LOG_NAME
        with translate_write_errors(path):
            kept = [to_json(e) for e in events(self.folder) if e["step"] <= step]
            with atomic_file(path) as temporary:  # so that a crash here does not lose events
                temporary.write_text("".join(f"{line}\n" for line in kept if step))
            self._trackers = open_trackers(self.track, self.folder, step, self.facts)
            self._file = path.open("a", encoding="utf-8", buffering=1)
        self._start, self._first, self._shown = time.monotonic(), step, 0.0
        self._table = (
            _LiveTable(self.steps, self.unit, step) if self.live and sys.stderr.isatty() else None
        )

    def show_start(self, model: str, facts: dict[str, Any]) -> None:
        """Show on the terminal what is trained, on what and where.

        Args:
            model: Name of the model.
            facts: See `TrainingSetup.facts`.
        """
        if not self.active:
            return
        text = format_start(model, facts, self.unit)
        if self._table:
            self._table.show_start(text)
        else:
            log.info("%s", text)

    def wants_progress(self, step: int) -> bool:
        """Return whether the terminal should show a step, although it is not logged: the first
        one, and in a live table another one after some time."""
        if not self.active:
            return False
        is_first = step == self._first + 1
        return is_first or (self._table is not None and time.monotonic() - self._shown > PROGRESS_S)

    def show_progress(self, values: dict[str, Any]) -> None:
        """Show the values of a step on the terminal: step, epoch, loss and lr."""
        self._show("step", self._with_times(values))

    def _with_times(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values with the time since the start and, if it is not known more exactly,
        the time to the end, both in seconds."""
        elapsed = time.monotonic() - self._start
        left = (self.steps - values["step"]) * elapsed / max(1, values["step"] - self._first)
        return {"eta": left, **values, "elapsed": elapsed}

    def _show(self, event: str, values: dict[str, Any]) -> None:
        self._shown = time.monotonic()
        if self._table:
            self._table.show(event, values)
        else:
            log.info("%s", format_event(event, values, self.steps, self.unit))

    def log_event(self, event: str, **values: Any) -> None:
        """Write an event to the log, and show it on the terminal.

        Raises:
            OutputError: The log cannot be written.
        """
        if not self.active:
            return
        with translate_write_errors(self.folder / LOG_NAME):
            self._file.write(to_json({"event": event, **values}) + "\n")
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, float)}
            for tracker in self._trackers if numbers else ():
                tracker.log(values["step"], numbers)
        if event == "bad":
            log.warning("%s: %s", values["input"], values["message"])
        elif event == "step":
            self._show(event, self._with_times(values))
        elif event in ("val", "probe"):
            self._show(event, values)

    def close(self, outcome: Outcome = "finished") -> None:
        """Close the log, if it is open, and tell trackers how the run has ended."""
        if not self.active or not hasattr(self, "_file"):
            return
        if self._table:
            self._table.close()
        # Each event was written at once, or its error was raised then.
        with contextlib.suppress(OSError):
            self._file.close()
        for tracker in getattr(self, "_trackers", ()):
            with contextlib.suppress(OSError):
                tracker.close(outcome)

    def draw_curves(self) -> Path | None:
        """Draw the curves of loss and accuracy from the log.

        Returns:
            Path of the PNG, or None if nothing has been measured or matplotlib is not installed.

        Raises:
            OutputError: The file cannot be written.
        """
        with translate_write_errors(self.folder / LOG_NAME):
            plots = self._curves()
        if not plots["loss"]:
            return None
        path = self.folder / CURVES_NAME
        try:
            charts.draw_curves(path, plots, "passes over the data")
        except UsageError:  # matplotlib is optional, and a run must not fail because of a chart
            log.info("%s needs matplotlib: pip install 'hiera-toolkit[plots]'", CURVES_NAME)
            return None
        return path

    def _curves(self) -> dict[str, dict[str, charts.Curve]]:
        """Return the curves in the log: title of a plot -> label of a curve -> points."""
        logged = list(events(self.folder))
        plots: dict[str, dict[str, charts.Curve]] = {"loss": {}}
        for event, name, title, label in (
            ("step", "loss", "loss", "training"),
            ("val", "loss", "loss", "held out"),
            ("val", "top1", "accuracy (%)", "top-1, held out"),
            ("val", "top5", "accuracy (%)", "top-5, held out"),
            ("probe", "top1", "accuracy (%)", "top-1, probe"),
        ):
            pairs = [(e.get("epoch"), e.get(name)) for e in logged if e["event"] == event]
            points = [(x, y) for x, y in pairs if _is_number(x) and _is_number(y)]
            if points:
                x, y = zip(*points, strict=True)
                plots.setdefault(title, {})[label] = (x, y)
        return plots


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the events in the log of a run, up to a line that is damaged.

    A crash may have truncated the last line, and a log from somebody else may hold anything.
    """
    path = folder / LOG_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not (isinstance(event, dict) and isinstance(event.get("event"), str)):
            return
        if not isinstance(event.get("step"), int):
            return
        yield event


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def format_start(model: str, facts: dict[str, Any], unit: str) -> str:
    """Return a line about a run that starts or resumes.

    Args:
        model, facts: See `RunLog.show_start`.
        unit: "images" or "clips".
    """
    trained = facts.get("trained", facts["parameters"])
    some = f" ({trained / 1e6:.3g}M trained)" if trained < facts["parameters"] else ""
    parts = [
        f"{model}: {facts['parameters'] / 1e6:.3g}M parameters{some}",
        f"{facts['samples']} {unit}",
        f"{facts['held_out']} held out" if facts["held_out"] else "none held out",
        f"on {facts['device']} in {facts['precision']}",
        f"weights {facts['weights']}",
    ]
    if facts["classes"]:
        parts[1:1] = [f"{facts['classes']} classes"]
    if facts["processes"] > 1:
        parts[-1:-1] = [f"{facts['processes']} processes"]
    return ", ".join(parts)


def format_event(event: str, values: dict[str, Any], steps: int, unit: str) -> str:
    """Return a log line for an event.

    Args:
        event: `step` or `val`.
        values: The values of the event.
        steps: Number of steps in the run.
        unit: "images" or "clips".
    """
    head = f"step {values['step']}/{steps}"
    if event in MEASURED:
        return f"{head}, {MEASURED[event]}: {_format_validation(values)}"
    parts = [f"{name} {_format(name, values[name], unit)}" for name in SHOWN if _has(values, name)]
    return f"{head}, {', '.join(parts)}"


def _format_validation(values: dict[str, Any]) -> str:
    parts = [f"loss {values['loss']:.4f}"] if "loss" in values else []
    parts += [f"{n[:3]}-{n[3]} {values[n]:.2f}%" for n in ("top1", "top5") if n in values]
    bad = f", {values['bad']} unreadable" if values.get("bad") else ""
    return f"{', '.join(parts)} ({values['samples']} samples{bad})"


def _has(values: dict[str, Any], name: str) -> bool:
    return values.get(name) is not None


def _format(name: str, value: float, unit: str) -> str:
    """Format a value of a step: `rate` per second, `elapsed` and `eta` in seconds, `memory` in
    GiB, `wait` and `mfu` as shares."""
    if name == "epoch":
        return f"{value:.2f}"
    if name == "rate":
        return f"{value:.1f} {unit}/s"
    if name in ("wait", "mfu"):
        return f"{100 * value:.0f}%"
    if name in ("elapsed", "eta"):
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"
    if name == "memory":
        return f"{value:.1f} GiB"
    return f"{value:.4g}"


class _LiveTable:
    """Table on the terminal with the progress and the last measurements of a run."""

    def __init__(self, steps: int, unit: str, step: int) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._unit, self._values = unit, dict[str, Any]()
        self._measured = {"val": "-"}
        self._progress = Progress(TextColumn("step"), BarColumn(40), MofNCompleteColumn())
        self._task = self._progress.add_task("", total=steps, completed=step)
        self._live = Live(console=Console(stderr=True), refresh_per_second=4)
        self._live.start()

    def show_start(self, text: str) -> None:
        """Print a line above the table."""
        self._live.console.print(text, highlight=False, markup=False)
        self._live.update(self._render())

    def show(self, event: str, values: dict[str, Any]) -> None:
        if event in MEASURED:
            self._measured[event] = _format_validation(values)
        elif event == "step":
            # Some values are measured for each report only, so the last ones stay.
            self._values |= values
            self._progress.update(self._task, completed=values["step"])
        self._live.update(self._render())

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for name in SHOWN:
            if _has(self._values, name):
                table.add_row(name, _format(name, self._values[name], self._unit))
        for event, text in self._measured.items():
            table.add_row(MEASURED[event], text)
        return Group(self._progress, table)
