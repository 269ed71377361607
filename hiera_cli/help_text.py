"""Help of the commands: panels of options, and examples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand, TyperGroup

# The panel of each option, by its long name. Panels are shown in this order.
PANELS: dict[str, tuple[str, ...]] = {
    "Input": (
        "recursive", "manifest", "path-column", "id-column", "private-urls", "on-error",
        "max-pixels", "fast-jpeg", "decoder", "pictures",
    ),
    "Model": (
        "model", "checkpoint", "labels", "random-init", "size", "resample", "init-from", "set",
        "free", "clear-compiled",
    ),
    "Measurement": (
        "all", "from", "mode", "size", "batch-sizes", "attention", "against", "seconds", "compare",
        "fail-over",
    ),
    "Reconstruction": ("mask-ratio", "seed", "raw", "reconstruction-only"),
    "Features": ("return-intermediates", "stages", "pool", "attention"),
    "Probe": ("probe", "val", "neighbours", "cache"),
    "Video": ("clips", "crops", "stride", "fps", "segments", "every"),
    "Output": (
        "to", "returns", "topk", "output", "format", "save-as", "shard-size", "rows", "save-images",
        "visualize", "export", "plot", "verify", "push-to-hub", "print-recipe", "track",
        "tensorboard", "profile", "resume", "overwrite",
    ),
    "Machine": (
        "device", "dtype", "batch-size", "workers", "compile", "parallel", "blocking-saves",
        "shard", "engine", "address", "dry-run",
    ),
    "Other": (
        "config", "quiet", "verbose", "debug", "version", "help", "install-completion",
        "show-completion",
    ),
}  # fmt: skip
# Where an option has another panel in one command than in the others.
PANELS_OF_COMMAND = {("features", "attention"): "Features", ("bench", "size"): "Measurement"}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "hiera predict photo.jpg                 the 1000 classes of ImageNet",
        "hiera models                            what -m takes",
    ),
    "predict": (
        "hiera predict photos/ --recursive -o classes.csv",
        "hiera predict match.mp4 --segments 10 --save-images shown/",
    ),
    "mae": (
        "hiera mae photo.jpg -o shown/",
        "hiera mae clip.mp4 -o shown/ --mask-ratio 0.75 --seed 3",
    ),
    "features": (
        "hiera features photos/ --recursive -o features/",
        "hiera features photo.jpg --stages 1,4 --visualize maps/",
    ),
    "train": (
        "hiera train hiera_tiny_224 flowers/ --init-from mae_hiera_tiny_224 -o run/",
        "hiera train mae_hiera_nano_32 digits --set optimizer.lr=1e-3",
    ),
    "eval": (
        "hiera eval flowers/ --checkpoint runs/flowers",
        "hiera eval imagenet/ -m mae_hiera_base_224 --probe linear",
    ),
    "convert": (
        "hiera convert runs/flowers flowers.onnx --to onnx",
        "hiera convert hiera_base_224 base_384 --to timm --size 384",
    ),
    "bench": (
        "hiera bench hiera_base_224 -b 1,8,64 --against timm --plot speed.png",
        "hiera bench --compare monday.json --fail-over 5%",
    ),
    "models": ("hiera models", "hiera models base -f json"),
}


def panel_of(command: str, option: str) -> str:
    """Return the title of the panel that shows an option of a command."""
    special = PANELS_OF_COMMAND.get((command, option))
    return special or next((panel for panel, names in PANELS.items() if option in names), "Other")


def help_text(command: Callable[..., object]) -> str:
    """Return the docstring of a command with each paragraph on one line, because typer keeps the
    line breaks within a paragraph, which then wraps badly on a narrow terminal."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def examples(command: str) -> str:
    """Return the examples of a command as the last paragraph of its help."""
    lines = "".join(f"\n  {_escape(line)}" for line in EXAMPLES[command])
    return f"Examples:{lines}"


class _InPanels:
    """Puts the options of a command into panels. A flag has no type, and brackets in a help text
    are not markup."""

    name: str | None

    def get_params(self, context: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(context)  # type: ignore[misc]
        for parameter in parameters:
            parameter.help = _escape(parameter.help or "")
            if parameter.param_type_name == "option":
                parameter.rich_help_panel = panel_of(self.name or "", _long_name(parameter))
                if parameter.is_flag:
                    parameter.metavar = ""
                elif parameter.metavar is None and getattr(parameter, "min", None) is not None:
                    parameter.metavar = "N"
        return sorted(parameters, key=_place)


class Command(_InPanels, TyperCommand):
    """A command, see `_InPanels`."""


class Group(_InPanels, TyperGroup):
    """The command `hiera` itself, see `_InPanels`."""


def _long_name(parameter: Any) -> str:
    """`--batch-size`, `-b` -> `batch-size`"""
    return str(max(parameter.opts, key=len)).removeprefix("--").lower()


def _place(parameter: Any) -> tuple[int, int]:
    """Return where the help shows a parameter: the number of its panel, and its row."""
    if parameter.param_type_name != "option":
        return -1, 0
    panel, name = parameter.rich_help_panel, _long_name(parameter)
    return [*PANELS].index(panel), PANELS[panel].index(name) if name in PANELS[panel] else 0


def _escape(text: str) -> str:
    """Return a text with its brackets escaped for rich, unless they are already."""
    return re.sub(r"(?<!\\)\[", r"\\[", text)
