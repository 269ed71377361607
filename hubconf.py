"""torch.hub entry points: `torch.hub.load(<repository>, "hiera_base_224", pretrained=True)`."""

dependencies = ["torch", "huggingface_hub", "yaml", "safetensors"]

from hiera_core.models.factory import functions as _functions  # noqa: E402

globals().update(_functions)
