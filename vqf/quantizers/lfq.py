"""Lookup-free quantization: the signs of the channels.

Language Model Beats Diffusion: Tokenizer is Key to Visual Generation (MAGVIT-v2), https://arxiv.org/abs/2310.05737,
section 3.1; several codebooks as in Open-MAGVIT2, https://arxiv.org/abs/2409.04410, and the groups of WeTok,
https://arxiv.org/abs/2508.05599.
"""

from vqf.quantizers.signs import SignQuantizer
from vqf.registry import register


@register("quantizer", "lfq")
class LookupFreeQuantizer(SignQuantizer):
    """The signs of the channels are the code, https://arxiv.org/abs/2310.05737.

    q = sign(z), index Σ_i 2^(i-1) 1{z_i > 0}; loss β |z - sg[q]|² + `entropy` (E[H(p)] - γ H(E[p])) with
    p = softmax(2 z·c / τ) over all codes c; the gradient of q goes to z unchanged.

    Good for 2^14 codes and more, which all stay in use. For few codes learned ones (`vq`, `cosine`) reconstruct better,
    and without the entropy term codes die. Open-MAGVIT2 has 18 bits, factors=[6,12], entropy_epsilon=1e-5 and these
    defaults.
    """
