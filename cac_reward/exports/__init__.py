"""Findings in the formats of annotation tools and datasets, out and in again.

Every format carries what its tools understand (frames, pixels, labels) and beside it a note with
the finding as it was. Where the drawing is still what the note draws, reading gives the finding
back exactly; where a person has changed it, the drawing counts.
"""
