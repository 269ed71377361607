"""Files and folders that commands write."""
