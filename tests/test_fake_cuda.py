"""Tests of CUDA without CUDA: models, inference and training steps on fake tensors of a CUDA
device, which have shapes, dtypes and a device, but no values. A tensor that is on the CPU by
mistake, or a result that the host would have to wait for, raises an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hiera_core
from hiera_core.data.clip_reader import ClipViews
from hiera_core.data.video_files.yuv_layout import WEIGHTS, Conversion, YuvLayout
from hiera_core.inference import batching
from hiera_core.inference.features import BatchExtractor, FeatureSelection
from hiera_core.inference.predict import Classifier
from hiera_core.inference.reconstruct import BatchReconstructor
from hiera_core.inference.transfer import Uploads, map_tensors
from hiera_core.training import optimizer
from hiera_core.training.dataloader import Batch
from hiera_core.training.losses import compute_losses
from hiera_core.training.recipe_reader import read_recipe

from .test_transfer import FakeCuda

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NANO = ["hiera_nano_32", "mae_hiera_nano_32", "hiera_nano_8x32", "mae_hiera_nano_8x32"]
FULL_SIZE = [name for name in hiera_core.list_models() if name not in NANO]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(batching, "Uploads", lambda device: Uploads(device, FakeCuda()))
    # Otherwise autocast turns itself off, because this machine has no GPU.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with FakeTensorMode():
        yield torch.device("cuda", 0)


def make_fake(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model on the fake device. It is built on the meta device, outside of fake mode."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        model: Any = hiera_core.create_model(name)
    for module in model.modules():
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[parameter_name] = torch.nn.Parameter(fake)
        assert all(buffer is None for buffer in module._buffers.values())
    return model


def forward(name: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    model = make_fake(name, dtype, device).eval()
    x = torch.empty(2, 3, *model.config["input_size"], dtype=dtype, device=device)
    with torch.no_grad():
        found = model(x)
    output: torch.Tensor = found if isinstance(found, torch.Tensor) else found[0]
    return output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NANO)
def test_small_models(name: str, dtype: str, device: torch.device) -> None:
    assert forward(name, DTYPES[dtype], device).device == device


@pytest.mark.parametrize(
    "name", ["hiera_tiny_224", "mae_hiera_base_16x224", "hiera_small_abswin_256", "sam2_hiera_tiny"]
)
def test_a_model_of_each_family(name: str, device: torch.device) -> None:
    output = forward(name, torch.float16, device)
    assert output.device == device


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FULL_SIZE)
def test_all_models(name: str, dtype: str, device: torch.device) -> None:
    assert forward(name, DTYPES[dtype], device).device == device


@pytest.mark.parametrize("place", ["norm1", "mlp", "attn"])
def test_a_tensor_on_the_cpu_is_found(
    place: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This shows that these tests can fail."""
    model = make_fake("hiera_nano_32", torch.float32, device).eval()
    layer = getattr(model.blocks[2], place)
    plain = layer.forward

    def planted(*args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = plain(*args, **kwargs)
        return found + torch.ones(found.shape[-1], device="cpu")

    monkeypatch.setattr(layer, "forward", planted)
    x = torch.empty(2, 3, 32, 32, device=device)
    with torch.no_grad(), pytest.raises(Exception, match="at least two devices, cuda:0 and cpu"):
        model(x)


def classifier(model: Any) -> Any:
    return Classifier(model)


def extractor(model: Any) -> Any:
    return BatchExtractor(model, FeatureSelection((1, 3), pool=False), keep_maps=True)


def reconstructor(model: Any) -> Any:
    return BatchReconstructor(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("hiera_nano_32", classifier),
        ("hiera_nano_32", extractor),
        ("mae_hiera_nano_32", reconstructor),
        ("hiera_nano_8x32", classifier),
        ("hiera_nano_8x32", extractor),
        ("mae_hiera_nano_8x32", reconstructor),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_steps_of_inference(
    name: str, make: Callable[[Any], Any], dtype: str, device: torch.device
) -> None:
    """From uint8 pixels on the device to results on their way to the host: normalise, compute."""
    runner = make(make_fake(name, DTYPES[dtype], device).eval())
    assert runner.overlaps and runner.device == device
    shape = (3, *runner.transform.size, 3)
    if runner.kind == "video":
        shape = (3, runner.transform.frames, *shape[1:])
    pixels = torch.empty(shape, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        found = runner.compute(runner.transform.normalise(pixels))
    results = runner._split(found)
    assert len(results) == 3
    devices: list[torch.device] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        devices.append(tensor.device)
        return tensor

    map_tensors(note, found)
    assert set(devices) == {device}, "something was copied to the host in between"


@pytest.mark.parametrize("turns", [0, 1])
def test_planes_of_clips_become_resized_frames(turns: int, device: torch.device) -> None:
    layout = YuvLayout(36, 63, turns, Conversion.of(*WEIGHTS["BT.709"], False))
    frames = torch.empty(5, layout.nbytes, dtype=torch.uint8, device=device)
    rows = torch.empty(4, dtype=torch.int64, device=device)
    views = ClipViews(frames, np.zeros((1, 4), np.int64), [(0, 0)], (16, 16), (16, 28), layout)
    resized = views.resize_clip(frames, rows)
    assert (resized.device, resized.dtype) == (device, torch.float32)
    assert resized.shape == (4, 16, 28, 3)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["hiera_nano_32", "mae_hiera_nano_32", "mae_hiera_nano_8x32"])
def test_steps_of_training(name: str, precision: str, device: torch.device) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        recipe = read_recipe(name)
    model = make_fake(name, torch.float32, device).train()
    x = torch.empty(4, 3, *model.config["input_size"], device=device)
    weight = torch.empty(4, device=device)
    target, units = None, None
    if name.startswith("mae_"):
        windows = model.layout.windows
        units = torch.empty(4, round(windows * 0.4), dtype=torch.int64, device=device)
    else:
        target = torch.empty(4, model.config["num_classes"], device=device)
    batch = Batch(x, weight, target, units)
    losses = compute_losses(model, batch, recipe, DTYPES[precision]).losses
    loss = (losses * weight).sum()
    assert loss.device == device and loss.requires_grad
    # PyTorch's backward pass looks for a real GPU. The update needs only the gradients' shapes.
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.device == device
    adamw = optimizer.build_optimizer(model, recipe.optimizer)
    optimizer.initialise_state(adamw)
    optimizer.set_learning_rate(adamw, 1e-3)
    adamw.step()
    states = [value for state in adamw.state.values() for value in state.values()]
    assert {value.device for value in states} == {device}
