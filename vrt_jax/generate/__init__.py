"""Text generation with a KV cache, and the masks of generated [SEG] tokens."""
