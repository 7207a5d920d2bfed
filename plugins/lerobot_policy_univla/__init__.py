"""LeRobot policy ``univla``: a checkpoint in ``lerobot-eval``, asked over its policy server.

LeRobot imports installed packages of this name by itself; nothing of JAX is needed beside PyTorch.
"""

from .configuration_univla import UnivlaConfig
from .modeling_univla import UnivlaPolicy
from .processor_univla import make_univla_pre_post_processors

__all__ = ["UnivlaConfig", "UnivlaPolicy", "make_univla_pre_post_processors"]
