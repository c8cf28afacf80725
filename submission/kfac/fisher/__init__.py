"""From the outputs of a model to the statistics of a step."""
