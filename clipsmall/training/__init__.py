"""What a training run holds while it runs: its state, its feed of batches, its optimizer and its
log.
"""
