"""A run that goes on with what users corrected: the images (collect), and whether it is better (verdict)."""
