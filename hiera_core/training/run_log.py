"""What a run says: a JSONL log always, a live view or lines for people, TensorBoard on demand."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..atomic import atomic_file
from ..errors import TrainingError, UsageError
from ..viz import charts
from .distributed import World

log = logging.getLogger("hiera")
LOG_NAME, CURVES_NAME = "log.jsonl", "curves.png"
SHOWN = ("loss", "lr", "grad_norm", "rate", "eta", "memory")


@dataclass
class RunLog:
    """Of one process's run; those that are not `active` (all but the first) say nothing.

    Each event is a dictionary with `event` (start, step, val, bad) and `step`.
    """

    folder: Path
    steps: int
    unit: str = "images"
    active: bool = True
    live: bool = True
    tensorboard: bool = False
    _last: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tensorboard:
            self._summary_writer = _summary_writer_class()

    def open(self, step: int) -> None:
        """Begin, or go on after `step` steps: what the log holds beyond them is forgotten."""
        if not self.active:
            return
        path = self.folder / LOG_NAME
        kept = [json.dumps(e) for e in events(self.folder) if e.get("step", 0) <= step]
        with atomic_file(path) as temporary:  # a crash here loses nothing
            temporary.write_text("".join(f"{line}\n" for line in kept if step))
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._writer = (
            self._summary_writer(self.folder / "tensorboard") if self.tensorboard else None
        )
        self._view = _View(self.steps, self.unit) if self.live and sys.stderr.isatty() else None
        self._began = time.monotonic()

    def say(self, event: str, **values: Any) -> None:
        """Log an event and show it."""
        if not self.active:
            return
        self._file.write(json.dumps({"event": event, **values}) + "\n")
        if self._writer:
            for name, value in values.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"{event}/{name}", value, values.get("step"))
        if event == "bad":
            log.warning("%s: %s", values["input"], values["message"])
        elif self._view:
            self._view.show(event, values)
        elif event in ("step", "val"):
            log.info("%s", format_event(event, values, self.steps, self.unit))

    def close(self) -> None:
        if not self.active or not hasattr(self, "_file"):
            return
        if self._view:
            self._view.close()
        self._file.close()
        if self._writer:
            self._writer.close()

    def draw(self) -> Path | None:
        """The curves of loss and accuracy so far."""
        steps = [e for e in events(self.folder) if e["event"] == "step"]
        vals = [e for e in events(self.folder) if e["event"] == "val"]
        panels: dict[str, dict[str, charts.Curve]] = {"loss": {}}
        if steps:
            panels["loss"]["training"] = ([e["epoch"] for e in steps], [e["loss"] for e in steps])
        for name, panel, label in (
            ("loss", "loss", "held out"),
            ("top1", "accuracy (%)", "top-1, held out"),
            ("top5", "accuracy (%)", "top-5, held out"),
        ):
            points = [(e["epoch"], e[name]) for e in vals if e.get(name) is not None]
            if points:
                x, y = zip(*points, strict=True)
                panels.setdefault(panel, {})[label] = (x, y)
        if not panels["loss"]:
            return None
        charts.draw_curves(self.folder / CURVES_NAME, panels, "passes over the data")
        return self.folder / CURVES_NAME


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """What a run has logged. A last line that a crash cut off is left out."""
    path = folder / LOG_NAME
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def format_event(event: str, values: dict[str, Any], steps: int, unit: str) -> str:
    """An event for people, in one line."""
    head = f"step {values['step']}/{steps}"
    if event == "val":
        return f"{head}, held out: {_accuracy(values)}"
    parts = [f"{name} {_number(name, values[name], unit)}" for name in SHOWN if values.get(name)]
    return f"{head}, {', '.join(parts)}"


def _accuracy(values: dict[str, Any]) -> str:
    parts = [f"loss {values['loss']:.4f}"]
    parts += [f"{n[:3]}-{n[3]} {values[n]:.2f}%" for n in ("top1", "top5") if n in values]
    bad = f", {values['bad']} unreadable" if values.get("bad") else ""
    return f"{', '.join(parts)} ({values['samples']} samples{bad})"


def _number(name: str, value: float, unit: str) -> str:
    if name == "rate":
        return f"{value:.1f} {unit}/s"
    if name == "eta":
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"
    if name == "memory":
        return f"{value:.1f} GiB"
    return f"{value:.4g}"


class StepStatistics:
    """The steps between two reports. Their numbers stay on the device: reading waits for it."""

    def __init__(self, world: World, step: int) -> None:
        self.world, self.step, self.rows = world, step, list[torch.Tensor]()
        self.began = time.perf_counter()

    def add(self, row: torch.Tensor) -> None:
        self.rows.append(row)

    def summary(self, scaled: bool) -> dict[str, Any]:
        """Means over the steps and all processes.

        Raises:
            TrainingError: a loss is no number, or a gradient (but `scaled` ones, for fp16: the
                scaler skips such a step).
        """
        rows = torch.stack(self.rows).double()
        norms = rows[:, 2].cpu()
        rows = self.world.sum(rows).cpu()
        good = rows[:, 0].isfinite() & (norms.isfinite() | scaled)
        if not bool(good.all()):
            step = self.step + int((~good).nonzero()[0]) + 1
            what = "gradient" if bool(rows[step - self.step - 1, 0].isfinite()) else "loss"
            raise TrainingError(
                f"the {what} of step {step} is no number",
                "no checkpoint holds it; lower optimizer.lr, set optimizer.clip_grad, or use --set "
                "precision=fp32 or bf16",
            )
        seconds = time.perf_counter() - self.began
        weight = rows[:, 1].clamp_min(1)
        read, lost = rows[:, 3].sum(), (rows[:, 3] - rows[:, 1]).sum()
        return {
            "loss": float((rows[:, 0] / weight).mean()),
            "grad_norm": float(norms.mean()),
            "rate": float(read) / seconds,
            "seconds": seconds,
            "read": int(read),
            "lost": int(lost),
        }


class _View:
    """A table that stays in place while a run goes on."""

    def __init__(self, steps: int, unit: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._unit, self._values, self._held_out = unit, dict[str, Any](), "-"
        self._progress = Progress(TextColumn("step"), BarColumn(60), MofNCompleteColumn())
        self._task = self._progress.add_task("", total=steps)
        self._live = Live(console=Console(stderr=True), refresh_per_second=4)
        self._live.start()

    def show(self, event: str, values: dict[str, Any]) -> None:
        if event == "val":
            self._held_out = _accuracy(values)
        elif event == "step":
            self._values = values
            self._progress.update(self._task, completed=values["step"])
        self._live.update(self._table())

    def close(self) -> None:
        self._live.stop()

    def _table(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(show_header=False, box=None)
        for name in SHOWN:
            if self._values.get(name):
                table.add_row(name, _number(name, self._values[name], self._unit))
        table.add_row("held out", self._held_out)
        return Group(self._progress, table)


def _summary_writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "--tensorboard needs TensorBoard", "pip install 'hiera-toolkit[tensorboard]'"
        ) from error
    return SummaryWriter
