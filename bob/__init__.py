"""bob: fine-grained classifiers from a few real photos per class (Beyond Objects, CVPR 2026)."""
