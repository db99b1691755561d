"""Classical classifiers on features that are computed once: of pixels, or of a network that stays as it is."""
