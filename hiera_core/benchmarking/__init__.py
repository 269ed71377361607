"""Speed, measured: models and their peers, each in a process of its own, in turns."""
