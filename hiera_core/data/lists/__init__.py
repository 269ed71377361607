"""What a list of files and labels looks like."""
