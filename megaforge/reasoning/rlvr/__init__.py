"""Reinforcement learning from verifiable rewards: a model writes answers, and learns from what they are worth."""
