"""One step's changes of the state: averages, inverses, directions, damping."""
