"""The seam between inputs and decoders of images: Pillow on the host, or nvJPEG on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...errors import DeviceError
from ..clip_sampling import Sampling
from ..image_reader import open_image
from ..transforms import ImageTransform
from .gpu_jpeg import decode_jpeg, has_gpu_decoder
from .torchcodec_video import check_torchcodec


def check_decoder(decoder: str, device: torch.device | None = None) -> None:
    """Check that a decoder can be used, before anything is read.

    Args:
        decoder: See `Sampling`.
        device: Where the model runs, if that is known.

    Raises:
        DeviceError: There is no GPU of NVIDIA for nvJPEG, the model runs elsewhere, or torchvision
            has no decoder.
        UsageError: torchcodec is not installed, or does not find FFmpeg.
    """
    if decoder == "torchcodec":
        check_torchcodec()
    if decoder == "nvjpeg":
        _check_nvjpeg(device)


def _check_nvjpeg(device: torch.device | None) -> None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise DeviceError(
            "decoder nvjpeg needs CUDA, which is not available here", "use the decoder pillow"
        )
    if not has_gpu_decoder():
        raise DeviceError("this torchvision decodes no JPEG files", "use the decoder pillow")
    if device is not None and device.type != "cuda":
        raise DeviceError(
            f"decoder nvjpeg needs CUDA, and the model runs on {device}",
            "use --device cuda, or the decoder pillow",
        )


def decode_image(
    content: Path | bytes | np.ndarray | torch.Tensor,
    sampling: Sampling,
    transform: ImageTransform,
    device: torch.device,
) -> tuple[Image.Image | torch.Tensor, list[str]]:
    """Return an image, upright, and notes for its record.

    Args:
        content: A path, the bytes of a file, or pixels, uint8 [y, x, 3].
        sampling: How images are read.
        transform: The preprocessing that follows.
        device: Where the model runs.

    Returns:
        An RGB image of Pillow; or uint8 [y, x, 3] on the device, if it was decoded there or lies
        there already.

    Raises:
        InputError: See `open_image`.
    """
    if isinstance(content, torch.Tensor):
        if content.device == device:
            return content, []
        content = content.cpu().numpy()
    if isinstance(content, np.ndarray):
        return Image.fromarray(content), []
    if sampling.decoder == "nvjpeg":
        decoded = decode_jpeg(content, device, sampling.max_pixels)
        if decoded is not None:
            return decoded, []
    enough = transform.enough_pixels if sampling.fast_jpeg else None
    return open_image(content, sampling.max_pixels, enough)
