"""Work that is timed as users run it: steps of training, and files to answers."""
