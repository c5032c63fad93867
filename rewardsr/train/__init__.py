"""From a recipe to a LoRA: preparation, the loop, checkpoints, the log."""
