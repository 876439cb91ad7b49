"""Tensor operations of uncomp, installed as `uncomp.kernels`.

One folder per operation: `naive.py` is the torch reference, `kernel.py` and `launch.py` the Triton
kernel and its launcher, `variants.py` what `python -m uncomp.kernels.compile` compiles, `README.md`
the maths and the least time. Imports torch and triton only, never vLLM or the rest of uncomp.

    paged           where the entries of a head lie in vLLM's blocks, compacted or not
    window_scores   importance of every cache entry for the last queries of a prompt
    gram            additive second-moment statistics of a head, and its trace-one covariance
    entropy         spectrum and truncated matrix entropy of a covariance
    select          max-pooling of scores and the choice of the entries that stay
    compact         moving what stays into the sub-blocks dealt to the heads
    decode          attention of single tokens over sub-blocks
    record          remembering the last queries, inside CUDA graphs too

Shared conventions. H: KV heads, G: query heads per KV head, N: cache entries padded to the longest
head, d: head size, w: window. `lengths[h]` counts the valid entries of head h; whatever lies beyond
is garbage, possibly NaN, and never influences a result.
"""
