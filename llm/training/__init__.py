"""Training: the pure step, its losses and optimizer, the state, checkpoints, and the loop that runs them."""
