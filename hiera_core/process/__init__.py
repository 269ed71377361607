"""How this process uses its machine: its share of the cores, and how memory is allocated."""
