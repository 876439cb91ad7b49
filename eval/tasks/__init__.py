"""Long-context tasks: each makes samples (text, questions, reference answers) for any length."""
