"""Cross-modal retinal image registration with a LoFTR-style matcher, taught by a dual-engine vessel curriculum."""

__version__ = "0.2.0"
