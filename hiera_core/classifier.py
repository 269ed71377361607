"""A classifier ready to run: class probabilities, and the classes' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import factory
from .errors import UsageError
from .model import Hiera
from .runner import Runner


class Classifier(Runner[Hiera, torch.Tensor]):
    """Class probabilities of preprocessed views.

    Args:
        model: a built classifier.
        class_names: in place of the model's own.
        options: `borrowed`, `device`, `dtype`, `batch_size`, `compile`, as for `Runner`.

    Raises:
        UsageError: no classifier.
        DeviceError: the device is not there, or too small for the model.
    """

    def __init__(
        self, model: torch.nn.Module, *, class_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__(_checked(model), **options)
        self.class_names = class_names or factory.class_names_of(self.model)
        # Logits: the softmax is taken in fp32, where 1000 probabilities do not fall together.
        self._logits = self.compiled(self.model.forward_logits)

    def __call__(self, views: Sequence[np.ndarray]) -> torch.Tensor:
        """Views as the transform makes them -> float32 [views, classes] on the CPU.

        Raises:
            DeviceError: out of memory with a single view.
        """
        return torch.stack(self.run(views))

    def compute(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        probabilities: torch.Tensor = self._logits(x.to(self.dtype)).float().softmax(-1).cpu()
        return probabilities.unbind()


def _checked(model: torch.nn.Module) -> Hiera:
    if not isinstance(model, Hiera):
        raise UsageError(
            "this is an autoencoder: it reconstructs, it does not classify",
            "use a classifier such as hiera_base_224",
        )
    if not model.config["num_classes"]:
        raise UsageError("this model has no classifier (num_classes=0)", "give it a head")
    return model
