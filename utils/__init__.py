"""How a network is trained and judged: losses, the training loop, checkpoints, metrics, evaluation, figures."""
