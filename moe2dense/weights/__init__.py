"""Read the weights of a checkpoint from disk, tensor by tensor, in the precisions checkpoints come in."""
