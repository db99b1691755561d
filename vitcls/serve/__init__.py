"""A run behind HTTP: engine and app, which run is served (promotion), and whether the world has changed (drift)."""
