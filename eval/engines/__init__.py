"""Ways to ask a model: an engine started here, or any server over HTTP."""
