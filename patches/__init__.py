"""The complete list of what uncomp changes in vLLM; README.md is generated from these files."""
