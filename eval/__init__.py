"""Everything that produces a number. ``python -m uncomp.eval.bench`` measures speed and memory."""
