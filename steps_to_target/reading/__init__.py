"""From paths to judged runs: folders, the CSV and JSON files in them, copies, wandb."""
