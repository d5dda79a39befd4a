"""Traces in a browser: text and masks that light up together. No network, no framework."""
