"""Motion: one training step with five verbs, and the loop around it."""
