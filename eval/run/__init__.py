"""The stages of an evaluation: prepare, predict, score, report."""
