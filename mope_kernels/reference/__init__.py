"""Reference implementations of all ops in plain PyTorch, one file each, against which the kernels are tested.

They are written for comparison with the papers and to run in float64, not for speed. Softmax, selection and statistics are
computed in float32 (float64 for float64 input), matrix products in the input dtype. Autocast is disabled inside, so results
depend only on the dtypes of the arguments.

Sizes: B batch, H heads, L tokens (Lq queries, Lk keys), D head width, C model width, P prompts, K experts,
k selected experts, S static prompts, M instance prompts, N rows, s width of a router's query.
"""

from .add_norm import add_norm
from .expert_adapter import expert_adapter
from .gelu_mlp import gelu_mlp
from .importance_loss import importance_loss
from .mix_prompts import mix_prompts
from .mope_attention import mix_bank, mope_attention
from .numbers import autocast_off, statistics_dtype, without_autocast
from .prompt_attention import pack_items, pad_items, prompt_attention
from .prompted_norm import prompted_norm
from .route import dense_weights, route
from .window_prompt_attention import shift_mask, window_partition, window_prompt_attention, window_reverse

__all__ = [
    "add_norm",
    "autocast_off",
    "dense_weights",
    "expert_adapter",
    "gelu_mlp",
    "importance_loss",
    "mix_bank",
    "mix_prompts",
    "mope_attention",
    "pack_items",
    "pad_items",
    "prompt_attention",
    "prompted_norm",
    "route",
    "shift_mask",
    "statistics_dtype",
    "window_partition",
    "window_prompt_attention",
    "window_reverse",
    "without_autocast",
]
