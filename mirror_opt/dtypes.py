"""Half precision is for storage: what is computed or learned has at least float32."""

import torch

__all__ = ["at_least_float32"]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16 and bfloat16, and the dtype itself for those that hold more.

    Example:
        >>> at_least_float32(torch.bfloat16), at_least_float32(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)
