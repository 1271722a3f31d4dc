"""RLHF on TRL: supervised fine-tuning, reward model and PPO over one transformer."""
