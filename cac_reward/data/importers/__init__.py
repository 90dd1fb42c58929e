"""Annotations of other projects, each read from the files as published."""
