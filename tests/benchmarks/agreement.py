"""How often half precision gives fp32's answer, ours and the reference's.

    python -m tests.benchmarks.agreement [--dtype bf16] [--device cpu]

Two questions: hiera_nano_32 on the digits that training holds out, and Hiera-B with drawn weights
on crops of real pictures, where the reference answers the same. Prints the share of equal top-1 and
the largest difference of a probability.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

import hiera_core
from hiera_core.datasets import held_out
from hiera_core.device import DTYPES
from hiera_core.preprocess.image import ImageTransform, open_image
from tests.conftest import draw_weights

PICTURES = "astronaut chelsea coffee rocket camera coins page moon text clock cat grass".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--crops", type=int, default=200)
    options = parser.parse_args()
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    model = hiera_core.hiera_nano_32(pretrained=True)
    transform = ImageTransform.from_card(model.card["preprocessing"], (32, 32))
    views = [transform.crop(open_image(s.content())[0]) for s in held_out("digits").sources]
    say("hiera_nano_32, held-out digits", *answers(model, transform, views, dtype, device))
    import hiera

    transform = ImageTransform.from_card(None, (224, 224))
    views = [transform.crop(crop) for crop in crops(options.crops)]
    reference = draw(hiera.hiera_base_224(), transform, views)
    ours = hiera_core.hiera_base_224()
    ours.load_state_dict(reference.state_dict())
    for name, net in (("ours", ours), ("reference", reference)):
        say(f"Hiera-B, drawn weights, {name}", *answers(net, transform, views, dtype, device))


@torch.inference_mode()
def draw(model: Any, transform: ImageTransform, views: list[np.ndarray]) -> Any:
    """Weights under which pictures get classes of their own: with others all pictures look alike,
    so the head is drawn for what differs between them."""
    draw_weights(model).eval()
    head, model.head = model.head, torch.nn.Identity()
    features = torch.cat(list(outputs(model, transform, views, torch.float32)))
    model.head = head
    mean = features.mean(0)
    # Alike in all directions in which pictures differ, so that many classes win somewhere.
    _, spread, directions = torch.linalg.svd(features - mean, full_matrices=False)
    seen = directions[:32] / spread[:32, None] * len(views) ** 0.5
    shape = (head.projection.out_features, len(seen))
    weight = torch.randn(shape, generator=torch.manual_seed(0)) @ seen
    head.projection.weight.copy_(weight)
    head.projection.bias.copy_(-(weight @ mean))
    return model


def outputs(
    model: Any,
    transform: ImageTransform,
    views: list[np.ndarray],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Iterator[torch.Tensor]:
    for first in range(0, len(views), 20):
        pixels = torch.from_numpy(np.stack(views[first : first + 20])).to(device)
        yield model(transform.normalise(pixels).to(dtype)).float().cpu()


def crops(count: int) -> Iterator[Image.Image]:
    import skimage.data

    generator = np.random.default_rng(0)
    for number in range(count):
        picture = Image.fromarray(getattr(skimage.data, PICTURES[number % len(PICTURES)])())
        side = int(generator.integers(64, min(picture.size)))
        x, y = (int(generator.integers(0, size - side + 1)) for size in picture.size)
        yield picture.convert("RGB").crop((x, y, x + side, y + side))


@torch.inference_mode()
def answers(
    model: Any,
    transform: ImageTransform,
    views: list[np.ndarray],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in fp32 and in `dtype`; the softmax is fp32's in both."""
    found = []
    for number in (torch.float32, dtype):
        net = copy.deepcopy(model).eval().to(device, number)
        net.head.act_func = torch.nn.Identity()
        logits = torch.cat(list(outputs(net, transform, views, number, device)))
        found.append(logits.softmax(-1))
    return found[0], found[1]


def say(name: str, exact: torch.Tensor, half: torch.Tensor) -> None:
    same = (exact.argmax(1) == half.argmax(1)).float().mean().item()
    print(
        f"{name}: top-1 equal on {same:.1%} of {len(exact)}, {exact.argmax(1).unique().numel()} "
        f"classes, largest difference of a probability {(exact - half).abs().max():.4f}"
    )


if __name__ == "__main__":
    main()
