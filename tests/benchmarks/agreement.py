"""Compare half precision with fp32, or fast decoding with exact: how often is the top-1 class the
same?

    python -m tests.benchmarks.agreement [--dtype bf16] [--device cpu]
    python -m tests.benchmarks.agreement --fast-jpeg

With --fast-jpeg, Hiera-B with drawn weights sees crops of real pictures, stored as JPEG files that
are at least four times as large as its input, decoded whole and to a half of their size. Otherwise,
there are two comparisons: hiera_nano_32 on the held-out digits, and Hiera-B with drawn weights on
crops of real pictures, for our model and the reference's. Prints the share of inputs with the same
top-1 class, and the largest difference of a probability.
"""

from __future__ import annotations

import argparse
import copy
import io
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
    parser.add_argument("--crops", type=int, default=200, help="inputs of Hiera-B")
    parser.add_argument("--heads", type=int, default=50, help="random heads of Hiera-B")
    parser.add_argument("--fast-jpeg", action="store_true", help="compare decoding instead")
    options = parser.parse_args()
    if options.fast_jpeg:
        compare_decoding(options.crops, options.heads)
        return
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    model = hiera_core.hiera_nano_32(pretrained=True)
    transform = ImageTransform.from_preprocessing(model.card["preprocessing"], (32, 32))
    views = [transform.crop(open_image(s.content())[0]) for s in open_eval_data("digits").sources]
    found = outputs_in_both_dtypes(model, transform, views, dtype, device)
    print_agreement("hiera_nano_32, held-out digits", [tuple(x.softmax(-1) for x in found)])
    import hiera

    transform = ImageTransform.from_preprocessing(None, (224, 224))
    views = [transform.crop(crop) for crop in crops(options.crops)]
    reference = draw_weights(hiera.hiera_base_224())
    ours = hiera_core.hiera_base_224()
    ours.load_state_dict(reference.state_dict())
    exact = None
    for name, net in (("ours", ours), ("reference", reference)):
        net.head = torch.nn.Identity()
        full, half = outputs_in_both_dtypes(net, transform, views, dtype, device)
        exact = full if exact is None else exact  # one set of heads for both models
        heads = [draw_head(exact, seed) for seed in range(options.heads)]
        pairs = [
            (probabilities(full, *head), probabilities(half.to(dtype), *head)) for head in heads
        ]
        print_agreement(f"Hiera-B, drawn weights, {name}", pairs)


def draw_head(features: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a head of 1000 classes, whose logits depend on the differences between the pictures.

    The features of all pictures are similar, so an ordinary random head gives them the same class.
    This head gives equal weight to the 32 directions in which the features differ most, so that
    many classes occur.

    Returns:
        Weight and bias.
    """
    mean = features.mean(0)
    _, spread, directions = torch.linalg.svd(features - mean, full_matrices=False)
    basis = directions[:32] / spread[:32, None] * len(features) ** 0.5
    weight = torch.randn(1000, len(basis), generator=torch.manual_seed(seed)) @ basis
    return weight, -(weight @ mean)


def probabilities(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Apply a head in the dtype of the features. The softmax is in fp32."""
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
    """Yield the outputs of a model, batch by batch."""
    for first in range(0, len(views), 20):
        pixels = torch.from_numpy(np.stack(views[first : first + 20])).to(device)
        yield model(transform.normalise(pixels).to(dtype)).float().cpu()


@torch.inference_mode()
def compare_decoding(count: int, heads: int) -> None:
    """Compare the pixels and classes of JPEG files that are decoded exactly and fast."""
    model = draw_weights(hiera_core.hiera_base_224(input_size=(64, 64))).eval()
    transform = ImageTransform.from_preprocessing(None, (64, 64))
    exact, fast = [], []
    for crop in crops(count, smallest=300):
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=90)
        exact.append(transform.crop(open_image(file.getvalue())[0]))
        image, _ = open_image(file.getvalue(), enough_pixels=transform.enough_pixels)
        assert image.width < crop.width
        fast.append(transform.crop(image))
    model.head = torch.nn.Identity()
    features = [
        torch.cat(list(outputs(model, transform, views, torch.float32))) for views in (exact, fast)
    ]
    drawn = [draw_head(features[0], seed) for seed in range(heads)]
    pairs = [tuple(probabilities(x, *head) for x in features) for head in drawn]
    change = np.abs(np.stack(exact).astype(int) - np.stack(fast).astype(int))
    print(f"pixels differ by {change.mean():.2f} of 255 on average, by {change.max()} at most")
    print_agreement("Hiera-B, drawn weights, fast decoding", pairs)


def crops(count: int, smallest: int = 64) -> Iterator[Image.Image]:
    """Yield random square crops of real pictures, with sides of at least `smallest` pixels."""
    import skimage.data

    generator = np.random.default_rng(0)
    names = [n for n in PICTURES if min(getattr(skimage.data, n)().shape[:2]) >= smallest]
    for number in range(count):
        picture = Image.fromarray(getattr(skimage.data, names[number % len(names)])())
        side = int(generator.integers(smallest, max(smallest + 1, min(picture.size))))
        x, y = (int(generator.integers(0, size - side + 1)) for size in picture.size)
        yield picture.convert("RGB").crop((x, y, x + side, y + side))


@torch.inference_mode()
def outputs_in_both_dtypes(
    model: Any,
    transform: ImageTransform,
    views: list[np.ndarray],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, or the features of a model without a head, in fp32 and in `dtype`."""
    results = []
    for model_dtype in (torch.float32, dtype):
        net = copy.deepcopy(model).eval().to(device, model_dtype)
        net.head.act_func = torch.nn.Identity()
        results.append(torch.cat(list(outputs(net, transform, views, model_dtype, device))))
    return results[0], results[1]


def print_agreement(name: str, pairs: list[tuple[torch.Tensor, ...]]) -> None:
    """Print how well fp32 and half precision agree.

    Args:
        name: Model and data.
        pairs: For each head, the probabilities in fp32 and in half precision.
    """
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
