"""Errors of devices, their registry and their repository."""

from compression.errors import InputError


class DeviceError(InputError):
    """A device, its registry or the repository cannot do what was asked; nothing of it was done."""
