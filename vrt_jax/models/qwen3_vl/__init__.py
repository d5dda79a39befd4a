"""Qwen3-VL: vision tower, text decoder and their join."""
