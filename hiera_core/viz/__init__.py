"""Pictures of results: annotated inputs, grids, feature maps, charts, and their paths."""
