"""Pictures of results: annotated inputs, grids, feature maps and charts."""
