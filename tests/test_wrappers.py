"""Tests of models in the wrappers of PyTorch and PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hiera_core
from hiera_core.errors import UsageError
from hiera_core.models.encoder import unwrap_model
from hiera_core.zoo import ASSETS

from .conftest import assert_close

PICTURE = ASSETS / "samples" / "three.png"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Join a group of one process."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "ddp": nn.parallel.DistributedDataParallel,
    "data-parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled-ddp": lambda model: torch.compile(  # type: ignore[return-value]
        nn.parallel.DistributedDataParallel(model), backend="eager"
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_work_everywhere(name: str, group: None) -> None:
    classifier = hiera_core.hiera_nano_32(pretrained=True).eval()
    wrapped = WRAPPERS[name](classifier).eval()
    assert type(unwrap_model(wrapped)) is hiera_core.Hiera
    expected, found = (hiera_core.predict(PICTURE, model) for model in (classifier, wrapped))
    assert [p["id"] for p in found["topk"]] == [p["id"] for p in expected["topk"]]
    expected, found = (hiera_core.features(PICTURE, model) for model in (classifier, wrapped))
    assert_close(found["embedding"], expected["embedding"])
    assert hiera_core.transform_for(wrapped) == hiera_core.transform_for(classifier)

    autoencoder = hiera_core.mae_hiera_nano_32(pretrained=True).eval()
    x, ids = torch.randn(1, 3, 32, 32), torch.tensor([[0, 5, 9]])
    expected = hiera_core.reconstruct(autoencoder, x, keep_ids=ids)
    wrapped = WRAPPERS[name](autoencoder).eval()
    for raw in (False, True):
        found = hiera_core.reconstruct(wrapped, x, keep_ids=ids, raw=raw)
        assert_close(found.loss, expected.loss)
    with pytest.raises(UsageError, match="this is an autoencoder"):
        hiera_core.predict(PICTURE, wrapped)
    with pytest.raises(UsageError, match="takes an autoencoder"):
        hiera_core.reconstruct(WRAPPERS[name](classifier), x)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_adapters_stay_active() -> None:
    peft = pytest.importorskip("peft")
    model = hiera_core.hiera_nano_32(pretrained=True).eval()
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(target_modules=["qkv", "fc1"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(unwrap_model(wrapped)(x), wrapped(x))
    ours, base = (hiera_core.features(PICTURE, m)["embedding"] for m in (wrapped, plain))
    assert (ours - base).abs().max() > 1e-3
    assert_close(hiera_core.features(PICTURE, unwrap_model(wrapped))["embedding"], ours)


class Net(nn.Module):
    """A model of the user's own that holds a Hiera and does more."""

    def __init__(self) -> None:
        super().__init__()
        self.module = hiera_core.hiera_nano_32()


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), Net(), nn.Sequential(nn.Identity())],
    ids=["linear", "net", "sequential"],
)
@pytest.mark.parametrize("call", ["predict", "features", "evaluate", "reconstruct", "transform"])
def test_other_models_are_named_by_their_type(model: nn.Module, call: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "predict": lambda: hiera_core.predict(PICTURE, model),
        "features": lambda: hiera_core.features(PICTURE, model),
        "evaluate": lambda: hiera_core.evaluate("digits", model),
        "reconstruct": lambda: hiera_core.reconstruct(model, torch.zeros(1, 3, 32, 32)),
        "transform": lambda: hiera_core.transform_for(model),
    }
    with pytest.raises(UsageError, match=f"type {type(model).__name__}"):
        calls[call]()


def test_functions_that_take_names_say_so(tmp_path: Path) -> None:
    model: Any = hiera_core.hiera_nano_32()
    with pytest.raises(UsageError, match="save_pretrained"):
        hiera_core.convert(model, tmp_path / "out", "hub")
    with pytest.raises(UsageError, match="names of models"):
        hiera_core.bench(model)
    with pytest.raises(UsageError, match="names of models"):
        hiera_core.bench([model])
