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
from hiera_core.data.datasets import open_eval_data
from hiera_core.data.image_reader import open_image
from hiera_core.data.transforms import ImageTransform
from hiera_core.device import DTYPES
from tests.conftest import draw_weights

PICTURES = "astronaut chelsea coffee rocket camera coins page moon text clock cat grass".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--crops", type=int, default=200)
    parser.add_argument("--heads", type=int, default=50)
    options = parser.parse_args()
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    model = hiera_core.hiera_nano_32(pretrained=True)
    transform = ImageTransform.from_preprocessing(model.card["preprocessing"], (32, 32))
    views = [transform.crop(open_image(s.content())[0]) for s in open_eval_data("digits").sources]
    found = both(model, transform, views, dtype, device)
    say("hiera_nano_32, held-out digits", [tuple(x.softmax(-1) for x in found)])
    import hiera

    transform = ImageTransform.from_preprocessing(None, (224, 224))
    views = [transform.crop(crop) for crop in crops(options.crops)]
    reference = draw_weights(hiera.hiera_base_224())
    ours = hiera_core.hiera_base_224()
    ours.load_state_dict(reference.state_dict())
    exact = None
    for name, net in (("ours", ours), ("reference", reference)):
        net.head = torch.nn.Identity()
        full, half = both(net, transform, views, dtype, device)
        exact = full if exact is None else exact  # one set of heads for both
        heads = [draw_head(exact, seed) for seed in range(options.heads)]
        pairs = [(under(full, *head), under(half.to(dtype), *head)) for head in heads]
        say(f"Hiera-B, drawn weights, {name}", pairs)


def draw_head(features: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1000 classes for what differs between pictures, which otherwise all look alike: weight and
    bias. The same in all of the 32 directions in which they differ most, so that many classes win
    somewhere."""
    mean = features.mean(0)
    _, spread, directions = torch.linalg.svd(features - mean, full_matrices=False)
    seen = directions[:32] / spread[:32, None] * len(features) ** 0.5
    weight = torch.randn(1000, len(seen), generator=torch.manual_seed(seed)) @ seen
    return weight, -(weight @ mean)


def under(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Probabilities by a head in the features' own number format; the softmax is fp32's."""
    dtype = features.dtype
    logits = torch.nn.functional.linear(features, weight.to(dtype), bias.to(dtype))
    return logits.float().softmax(-1)


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
def both(
    model: Any,
    transform: ImageTransform,
    views: list[np.ndarray],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, or features of a model without a head, in fp32 and in `dtype`."""
    found = []
    for number in (torch.float32, dtype):
        net = copy.deepcopy(model).eval().to(device, number)
        net.head.act_func = torch.nn.Identity()
        found.append(torch.cat(list(outputs(net, transform, views, number, device))))
    return found[0], found[1]


def say(name: str, pairs: list[tuple[torch.Tensor, ...]]) -> None:
    """Of each head, or of the only one: probabilities in fp32 and in half precision."""
    shares = [(e.argmax(1) == h.argmax(1)).float().mean().item() for e, h in pairs]
    classes = min(e.argmax(1).unique().numel() for e, _ in pairs)
    largest = max((e - h).abs().max().item() for e, h in pairs)
    print(
        f"{name}: top-1 equal on {sum(shares) / len(shares):.2%} of {len(pairs[0][0])} x "
        f"{len(pairs)} heads, {classes} classes at least, largest difference of a probability "
        f"{largest:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
