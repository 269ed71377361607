"""Values that a shell completes: models, checkpoints, peers, data sets. Nothing here imports torch.

Each function takes what has been typed of a value, and returns how it may go on. If it returns
nothing, the shell completes names of files.
"""

from __future__ import annotations

import typer

from hiera_core import zoo
from hiera_core.conversion.formats import OUTPUTS

PEERS = ("reference", "timm", "transformers", "hiera-optim", "openvino", "onnxruntime", "vit")
DTYPES = ("fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda", "cuda:all", "mps", "xpu")
DATA_SETS = ("digits", "shapes")


def models(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a model, and after its dot that of a checkpoint."""
    base, dot, _ = incomplete.partition(".")
    if dot and base in zoo.models():
        return _matching([f"{base}.{tag}" for tag in zoo.get(base).checkpoints], incomplete)
    return _matching(_of_the_command(context), incomplete)


def classifiers_and_autoencoders(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of any model, without a checkpoint."""
    return _matching(zoo.names(), incomplete)


def checkpoints(context: typer.Context, incomplete: str) -> list[str]:
    """Complete weights: the checkpoints of --model if it is given, and names of models."""
    name = str(context.params.get("model") or "")
    tags = list(zoo.get(name).checkpoints) if name in zoo.models() else []
    return _matching(tags, incomplete) or models(context, incomplete)


def peers(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the last name of `timm,reference:fp32`."""
    *earlier, last = incomplete.split(",")
    start = "".join(f"{name}," for name in earlier)
    name, colon, _ = last.partition(":")
    choices = [f"{name}:{dtype}" for dtype in DTYPES] if colon and name in PEERS else list(PEERS)
    return [start + choice for choice in _matching(choices, last) if choice not in earlier]


def returns(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the last name of `maps,embedding`."""
    *earlier, last = incomplete.split(",")
    start = "".join(f"{name}," for name in earlier)
    return [start + name for name in _matching(OUTPUTS, last) if name not in earlier]


def devices(context: typer.Context, incomplete: str) -> list[str]:
    return _matching(DEVICES, incomplete)


def data_sets(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a built-in data set once its name has been begun; most data are files."""
    return _matching(DATA_SETS, incomplete) if incomplete else []


def _of_the_command(context: typer.Context) -> list[str]:
    """Return the models that a command is for: the autoencoders for `mae`, the classifiers for
    `predict` and `eval`, all for the others."""
    if context.info_name not in ("mae", "predict", "eval"):
        return zoo.names()
    wanted = context.info_name == "mae"
    return [name for name, entry in zoo.models().items() if entry.autoencoder == wanted]


def _matching(choices: list[str] | tuple[str, ...], incomplete: str) -> list[str]:
    return [choice for choice in choices if choice.startswith(incomplete)]
