"""Context synthesis: short instruction-answer pairs in, long-context training samples out."""

__version__ = "0.1.0"
