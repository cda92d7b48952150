"""What scores completions: reward functions, verifiers, reward models, and their weighted sum."""
