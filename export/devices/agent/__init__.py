"""The agent: a small program on the device that installs signed bundles and serves the model that is active.

It needs Python 3.9 or newer and the runtime of the models; of this project it imports nothing, so the folder can be
copied as it is. Signatures are checked by the package ``cryptography`` or, without it, by the program ``openssl``.
"""

__version__ = "1"
