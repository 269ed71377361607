"""Importing this package registers all models of the zoo in timm, which must be installed.

>>> import timm, hiera_core.timm_models
>>> model = timm.create_model("hiera_core_hiera_base_224", pretrained=True)

timm has no entry points that it reads by itself, so the import is needed. In its names, a slash
marks a repository and a point a checkpoint, so ours begin with `hiera_core_`; they do not replace
the models of the same name that timm has.
"""

from __future__ import annotations

from .registration import PREFIX, registered_names

__all__ = ["PREFIX", "registered_names"]
