"""The parts of a training run: state, feed of batches, optimizer, FSDP and metrics log."""
