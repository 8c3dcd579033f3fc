"""Load the rewards of a run, and score samples with them."""

from mmgrpo.scoring.load import NamedReward, check_modality, load_reward, load_rewards
from mmgrpo.scoring.runner import RewardRunner

__all__ = ["NamedReward", "RewardRunner", "check_modality", "load_reward", "load_rewards"]
