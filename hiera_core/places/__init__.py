"""Folders and files on this machine and at remote places, such as s3://."""
