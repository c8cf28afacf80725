"""Runs in wandb: their names, reading them, pushing folders. wandb is imported when needed."""
