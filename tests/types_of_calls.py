"""The types of a user's calls. CI checks this file with `mypy --strict`; nothing here runs."""

from pathlib import Path
from typing import assert_type

import torch

import hiera_core as hiera
from hiera_core.models.hiera import HieraEncoder
from hiera_core.records import RecordJson

Maps = list[torch.Tensor]


def calls(x: torch.Tensor) -> None:
    assert_type(hiera.predict("x.jpg"), RecordJson | list[RecordJson])
    assert_type(hiera.predict([Path("x.jpg")]), list[RecordJson])
    assert_type(hiera.features([Path("x.jpg")]), list[hiera.Features])
    assert_type(hiera.create_model("hiera_tiny_224", num_classes=3), HieraEncoder)
    assert_type(hiera.create_model("hiera_tiny_224", features_only=True), hiera.FeatureBackbone)
    backbone = hiera.create_model("hiera_tiny_224", features_only=True, out_indices=(1, -1))
    assert_type(backbone.feature_info.channels(), list[int])
    assert_type(backbone.feature_info.reduction(0), int)
    as_maps = bool(x.numel())
    either = hiera.create_model("hiera_tiny_224", features_only=as_maps)
    assert_type(either, HieraEncoder | hiera.FeatureBackbone)
    assert_type(hiera.hiera_tiny_224(pretrained=True), HieraEncoder)
    assert_type(hiera.evaluate("val").top1, float)
    assert_type(hiera.convert("a", "b", "hub").files, list[str])
    assert_type(hiera.bench().measurements[0].throughput, float | None)
    assert_type(hiera.train("hiera_nano_32", "digits", "runs/x")["step"], int)

    model = hiera.Hiera(stages=(1, 1, 2, 1))
    assert_type(model.forward(x), torch.Tensor)
    assert_type(model.forward(x, return_intermediates=True), tuple[torch.Tensor, Maps])
    assert_type(model.forward_features(x), torch.Tensor)
    assert_type(model.forward_intermediates(x), tuple[torch.Tensor, Maps])
    assert_type(model.forward_intermediates(x, intermediates_only=True), Maps)
    assert_type(model.transform("x.jpg"), torch.Tensor)
    assert_type(model.class_names, list[str] | None)
    assert_type(model.config["input_size"], tuple[int, ...])
    mae = hiera.MaskedAutoencoderHiera()
    assert_type(mae.config["decoder_depth"], int)
    assert_type(hiera.reconstruct(mae, x).loss, torch.Tensor)
    encoder = hiera.create_model("sam2_hiera_tiny")
    assert_type(encoder, hiera.HieraDet)
    assert_type(encoder.forward(x), Maps)
    assert_type(encoder.config["window_spec"], tuple[int, ...])
