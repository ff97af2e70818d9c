"""The miniature: its drawn world, and the training of its models."""
