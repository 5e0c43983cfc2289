"""What a training step needs, found without running it: on tensors with shapes but no numbers."""
