"""Networks: what a network is, our actor-critic, its layers, and distributions over actions."""

from purejaxppo.networks import layers, memories
from purejaxppo.networks.distributions import Categorical, JointCategorical, MultiCategorical, Normal, TanhNormal
from purejaxppo.networks.network import Network, from_linen, from_nnx

__all__ = [
    "Categorical", "JointCategorical", "MultiCategorical", "Network", "Normal", "TanhNormal", "from_linen", "from_nnx",
    "layers", "memories",
]  # fmt: skip
