"""uncomp: KV-cache compression for stock vLLM. Importing it imports neither torch nor vllm."""

__version__ = "0.1.0"
