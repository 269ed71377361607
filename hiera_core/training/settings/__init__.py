"""The parts of a recipe, and how plain values become parts. torch is not imported here."""
