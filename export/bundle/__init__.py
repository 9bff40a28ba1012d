"""Bundles: one signed file with everything a device needs of a model, see docs/bundle.md.

durable     files that appear whole or not at all
envelope    canonical JSON, and signatures around it (DSSE)
keys        private and public key files (Ed25519)
trust       which keys count, and how the next trust follows from the one before
statement   what a bundle says
content     the members, as a ZIP archive that has one form
package     the file: magic, envelope, content
golden, provenance, sbom    members that a run folder does not have yet
build       a bundle from a run folder
"""

from compression.errors import InputError


class BundleError(InputError):
    """A bundle, a trust or a key is not what it should be; nothing of it was used."""
