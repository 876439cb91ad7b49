"""Speed and memory on a live engine; every benchmark compares two things in one run."""
