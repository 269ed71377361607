"""Tests of backbones under heads of others: Mask R-CNN of torchvision, and a UPerNet-style head."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hiera_core

pytest.importorskip("torchvision.models.detection")

NARROW: Any = {"embed_dim": 16, "stages": (1, 1, 2, 1)}
SAM2: Any = {"embed_dim": 16, "stages": (1, 2, 3, 1), "global_att_blocks": (4,)}
# By name: the model, its arguments, and the size of the pictures that it gets.
CASES: dict[str, tuple[str, Any, tuple[int, int]]] = {
    "hiera-224": ("hiera_tiny_224", NARROW, (224, 224)),
    "hiera-320x448": ("hiera_tiny_224", {**NARROW, "dynamic_size": True}, (320, 448)),
    "abswin": ("hiera_small_abswin_256", NARROW, (192, 256)),
    "sam2-tiny": ("sam2_hiera_tiny", SAM2, (192, 224)),
}


def build_backbone(case: str) -> hiera_core.FeatureBackbone:
    name, arguments, _ = CASES[case]
    return hiera_core.create_model(name, features_only=True, **arguments)


class Pyramid(nn.Module):
    """A backbone with a feature pyramid, as torchvision's detectors expect it."""

    def __init__(self, backbone: hiera_core.FeatureBackbone, channels: int = 32) -> None:
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__()
        self.body, self.out_channels = backbone, channels
        widths = backbone.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(widths, channels, LastLevelMaxPool())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = OrderedDict((str(level), m) for level, m in enumerate(self.body(x)))
        found: dict[str, torch.Tensor] = self.fpn(maps)
        return found


class SegmentationHead(nn.Module):
    """The plain parts of UPerNet: pooled context, a top-down path, and a fusion of all levels."""

    def __init__(self, widths: list[int], classes: int, channels: int = 32) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.context = nn.ModuleList(nn.Conv2d(widths[-1], channels, 1) for _ in (1, 2))
        self.bottleneck = nn.Conv2d(3 * channels, channels, 3, padding=1)
        self.fuse = nn.Conv2d(len(widths) * channels, channels, 3, padding=1)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        levels = [conv(m) for conv, m in zip(self.lateral, maps, strict=True)]
        pooled = [
            F.interpolate(conv(F.adaptive_avg_pool2d(maps[-1], bins)), maps[-1].shape[2:])
            for bins, conv in zip((1, 2), self.context, strict=True)
        ]
        levels[-1] = self.bottleneck(torch.cat([levels[-1], *pooled], 1))
        for fine in range(len(levels) - 2, -1, -1):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], levels[fine].shape[2:])
        fused = torch.cat([F.interpolate(level, levels[0].shape[2:]) for level in levels], 1)
        return F.interpolate(self.classify(F.relu(self.fuse(fused))), size, mode="bilinear")


def step(parts: list[nn.Module], loss: torch.Tensor, backbone: nn.Module) -> None:
    """Take one step of training, and check the loss, the gradients and the parameters."""
    before = [p.detach().clone() for p in backbone.parameters()]
    optimizer = torch.optim.SGD([p for part in parts for p in part.parameters()], lr=1e-3)
    assert loss.isfinite()
    loss.backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    optimizer.step()
    after = [*backbone.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def pictures_with_boxes(size: tuple[int, int]) -> tuple[list[torch.Tensor], list[Any]]:
    """Return pictures of different sizes, each with a bright rectangle to find."""
    images, targets = [], []
    for number, share in enumerate((1.0, 0.8)):
        height, width = (int(side * share) for side in size)
        image = torch.rand(3, height, width) * 0.2
        box = torch.tensor([[20.0, 30.0, 90.0, 110.0 + number]])
        left, top, right, bottom = box[0].long().tolist()
        image[:, top:bottom, left:right] += 0.7
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, top:bottom, left:right] = 1
        images.append(image)
        targets.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask})
    return images, targets


@pytest.mark.parametrize("case", CASES)
def test_mask_rcnn_takes_a_step(case: str) -> None:
    """The pictures differ in size, and the detector pads them to one that the backbone takes."""
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    torch.manual_seed(0)
    backbone, size = build_backbone(case), CASES[case][2]
    detector = MaskRCNN(
        Pyramid(backbone),
        num_classes=2,
        min_size=min(size),
        max_size=max(size),
        size_divisible=32,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (96,), (128,)), ((1.0,),) * 5),
        rpn_post_nms_top_n_train=50,
        box_batch_size_per_image=16,
    ).train()
    seen: list[torch.Size] = []
    backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    losses = detector(*pictures_with_boxes(size))
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness"}
    assert all(loss.isfinite() for loss in losses.values())
    assert seen == [(2, 3, *size)]
    step([detector], sum(losses.values()), backbone)


@pytest.mark.parametrize("case", CASES)
def test_a_segmentation_head_takes_a_step(case: str) -> None:
    torch.manual_seed(0)
    backbone, size = build_backbone(case).train(), CASES[case][2]
    head = SegmentationHead(backbone.feature_info.channels(), classes=3)
    x, labels = torch.randn(1, 3, *size), torch.randint(0, 3, (1, *size))
    logits = head(backbone(x), size)
    assert logits.shape == (1, 3, *size)
    step([backbone, head], F.cross_entropy(logits, labels), backbone)
