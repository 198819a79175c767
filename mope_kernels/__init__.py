"""Fused ops of Mixture-of-Prompt-Experts models: tensors in, tensors out.

Each op is defined in plain PyTorch in `mope_kernels.reference`, and most have Triton (GPU) and C++ (CPU) implementations;
`explain(op, ...)` tells which one runs. Importing this package requires only torch.
"""

from .add_norm import add_norm
from .expert_adapter import expert_adapter
from .gelu_mlp import gelu_mlp
from .impl import Explanation, explain
from .importance_loss import importance_loss
from .mix_prompts import mix_prompts
from .mope_attention import ExpertBank, mope_attention
from .prompt_attention import prompt_attention
from .prompted_norm import prompted_norm
from .route import Routing, route
from .settings import reread_environment
from .window_prompt_attention import window_prompt_attention

__version__ = "0.1.0"

__all__ = [
    "ExpertBank",
    "Explanation",
    "Routing",
    "add_norm",
    "expert_adapter",
    "explain",
    "gelu_mlp",
    "importance_loss",
    "mix_prompts",
    "mope_attention",
    "prompt_attention",
    "prompted_norm",
    "reread_environment",
    "route",
    "window_prompt_attention",
]
