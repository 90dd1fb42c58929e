"""How good a judge is: its answers against annotated clips."""
