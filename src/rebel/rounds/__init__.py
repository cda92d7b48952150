"""Large batches: rollouts of a whole prompt set on disk, and the walk through them."""
