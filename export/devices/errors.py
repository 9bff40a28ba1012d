"""Errors of devices, their registry and their repository."""

from compression.errors import StillhouseError


class DeviceError(StillhouseError):
    """A device, its registry or the repository cannot do what was asked."""
