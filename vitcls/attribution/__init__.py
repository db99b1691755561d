"""Why a classifier says what it says: maps of evidence over an image, and whether such a map is true.

network     what a classifier shows of itself: its logits, its last map of features, its attention
cam, attention, gradients    the maps, each by its paper
evidence    deletion and insertion, the randomisation test, pointing
explainer   all of it for one network, batched and compiled: what commands and servers call
"""
