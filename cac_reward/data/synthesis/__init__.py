"""Faults planted into clean clips, with exact windows and boxes; needs the extra 'synthesis'."""
