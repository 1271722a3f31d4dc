"""Backbones, data, objectives and one training loop; rl and rlhf stand on the backbones."""
