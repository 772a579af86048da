"""Who learns: the loss, packed forward passes, the trainer, and the processes that it runs in."""
