"""What a step of training needs, found without running it: on tensors that have shapes and no
numbers.
"""
