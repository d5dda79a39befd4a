"""Reinforcement learning: rewards, rollouts, subset selection."""
