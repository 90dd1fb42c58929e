"""Annotated clips: the one format that judges are trained on, its files, checks and importers."""
