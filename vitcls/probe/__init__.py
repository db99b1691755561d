"""Classical classifiers on features of a network or of the images themselves: what training has to beat."""
