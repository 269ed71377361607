"""Images that lie on a device: resized and cropped there, without a copy on the host."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..transforms import MAX_WHOLE_RESIZE, ImageTransform


def crop_on_device(transform: ImageTransform, pixels: torch.Tensor) -> torch.Tensor | None:
    """Do what `ImageTransform.crop` does, where the image lies.

    Pillow rounds between its two passes, so pixels may differ by a few levels of 255.

    Args:
        transform: The preprocessing.
        pixels: uint8 [y, x, 3] on any device.

    Returns:
        uint8 [height, width, 3] on the same device; None for a very long image, of which Pillow
        resizes only a part.
    """
    (height, width), (h, w) = transform.size, pixels.shape[:2]
    new_w, new_h = transform.resized(w, h)
    is_whole = transform.crop_mode == "squash"
    if not is_whole and max(new_w, new_h) > MAX_WHOLE_RESIZE * transform.resize:
        return None
    resized = pixels
    if (new_h, new_w) != (h, w):
        planes = pixels.permute(2, 0, 1)[None].to(torch.float32)
        planes = functional.interpolate(
            planes,
            (new_h, new_w),
            mode=transform.interpolation,
            align_corners=False,
            antialias=True,
        )
        resized = planes[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    left, top = round((new_w - width) / 2), round((new_h - height) / 2)
    return resized[top : top + height, left : left + width].contiguous()
