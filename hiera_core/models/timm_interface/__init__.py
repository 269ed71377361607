"""The parts of timm's interface that all models have: what its tools and its users expect."""
