"""What leaves a run: one LoRA in the layouts of those who load it, or merged into its pipeline."""
