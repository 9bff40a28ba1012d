"""Images as they come from a bad camera: measured (corruptions, accuracy), learnt (chains), patched (signatures)."""
