"""Devices: the agent that runs on them, how bundles get there, and which devices there are."""
