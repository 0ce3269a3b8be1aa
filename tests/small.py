"""How tests turn their small trajectories file into samples, where they have no reason to differ: 10 to 15 neighbours, 3 frames."""

DATA = {"radius": 0.27, "horizon": 3, "frames": 3, "features": ["mass", "viscosity/max", "speed"]}
DATA["node_attributes"] = ["mass"]
