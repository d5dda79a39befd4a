"""Losses: pure functions of arrays, float32 inside, (sum, count) outside."""
