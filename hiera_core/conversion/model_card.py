"""README.md of a converted folder: model, source, licence, checksum and example code."""

from __future__ import annotations

from .formats import WEIGHTS_NAME
from .plan import ConversionPlan, transformers_class

LIBRARIES = {"hub": "hiera", "timm": "timm", "transformers": "transformers"}
TASKS = {2: "image-classification", 3: "video-classification"}
USES = {
    "hub": (
        "import hiera  # pip install hiera-transformer; or: import hiera_core as hiera\n"
        "model = hiera.{cls}.from_pretrained(FOLDER)"
    ),
    "timm": 'import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)',
    "transformers": ("from transformers import {cls}\nmodel = {cls}.from_pretrained(FOLDER)"),
}
SAM2_USES = {"hub": "import hiera_core\nmodel = hiera_core.{cls}.from_pretrained(FOLDER)"}


def model_card(plan: ConversionPlan, name: str, checksum: str) -> str:
    """Return the text of README.md, with the front matter that the hub reads.

    Args:
        plan: The model.
        name: Name of the format, a key of `LIBRARIES`.
        checksum: SHA-256 of the weights file, or an empty string to leave it out.
    """
    licence = str(plan.card.get("licence") or "unknown")
    task = None if plan.is_autoencoder else TASKS.get(len(plan.size))
    front = [f"library_name: {LIBRARIES[name]}", "tags:", "- hiera"]
    if licence != "unknown":
        front.insert(0, f"license: {licence.lower()}")
    if task:
        front.append(f"pipeline_tag: {task}")
    rows = {
        "source": f"`{plan.card.get('source', plan.checkpoint.source)}`",
        "licence of the weights": licence,
        "input": "x".join(map(str, plan.size)),
        "classes": str(plan.num_classes) if plan.num_classes else "none",
        "precision": plan.dtype,
    }
    if checksum:
        rows[f"SHA-256 of `{WEIGHTS_NAME}`"] = f"`{checksum}`"
    uses = USES | SAM2_USES if plan.is_sam2 else USES
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    notes = "".join(f"- {note}\n" for note in plan.notes)
    return f"""---
{chr(10).join(front)}
---

# {plan.name}

[Hiera](https://arxiv.org/abs/2306.00989), the hierarchical vision transformer (Ryali et al., ICML
2023), converted by hiera-toolkit.

| | |
|---|---|
{table}

```python
{uses[name].format(cls=_class_name(plan, name))}
```
{f"{chr(10)}{notes}" if notes else ""}"""


def _class_name(plan: ConversionPlan, name: str) -> str:
    return transformers_class(plan) if name == "transformers" else type(plan.model).__name__
