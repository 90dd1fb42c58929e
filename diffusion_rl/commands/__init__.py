"""One file for each command of `python -m diffusion_rl`."""
