"""Deep Q-learning on Atari: DQN and PQN on one set of environments, backbones and run folders."""
