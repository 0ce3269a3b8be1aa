"""Simulate one block of water in SPlisHSPlasH and save its frames: ``python engine.py DIR``.

Reads DIR/job.json: box and block (2, 3) low and high corner, velocity and gravity (3,), radius, dt, steps (engine steps a
frame), frames, plane (optional: two-dimensional, at z = 0). Writes DIR/position.npy (frames, N, 3) float32 at the end and the
number of finished frames to DIR/frames.
prepare.py starts one process for each trajectory, because the engine has global state and a crash in it ends its process.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def load_engine() -> Any:
    """The module pysplishsplash, which needs OpenGL libraries even without graphics."""
    try:
        # the wheel's libGLdispatch crashes at import unless the system's library is loaded first
        ctypes.CDLL("libGLdispatch.so.0", mode=ctypes.RTLD_GLOBAL)
        import pysplishsplash
    except (OSError, ImportError) as error:
        hint = "pip install -e '.[fluid]'; on Debian also apt-get install libgl1 libglu1-mesa libopengl0"
        raise SystemExit(f"SPlisHSPlasH does not load ({error}); {hint}") from None
    return pysplishsplash


def write_scene(directory: Path, job: dict[str, Any]) -> None:
    """Write scene.json and box.obj with the walls, in the engine's formats."""
    corners = ["v {:.8g} {:.8g} {:.8g}".format(*corner) for corner in itertools.product(*zip(*job["box"], strict=True))]
    # corner 1 + 4 i + 2 j + k is at (low, high)[i], …; two triangles a side, counterclockwise from outside
    sides = ("1243", "5786", "1562", "3487", "1375", "2684")
    faces = [f"f {s[0]} {s[1]} {s[2]}\nf {s[0]} {s[2]} {s[3]}" for s in sides]
    (directory / "box.obj").write_text("\n".join([*corners, *faces]) + "\n", encoding="utf-8")
    step = job["dt"] / job["steps"]
    scene = {
        "Configuration": {
            "particleRadius": job["radius"],
            "simulationMethod": 4,  # DFSPH
            "sim2D": job.get("plane", False),
            "boundaryHandlingMethod": 0,  # walls of particles (Akinci et al. 2012)
            "gravitation": job["gravity"],
            "cflMethod": 0,  # steps of constant length, so that frames fall on steps
            "timeStepSize": step,
            "stopAt": (job["frames"] - 1) * job["dt"] + step / 2,
        },
        "Materials": [{"id": "Fluid", "density0": 1000, "viscosity": 0.01, "viscosityMethod": 1}],
        "RigidBodies": [{"geometryFile": "box.obj", "isDynamic": False, "isWall": True, "samplingMode": 1}],
        "FluidBlocks": [
            {"denseMode": 0, "start": job["block"][0], "end": job["block"][1], "initialVelocity": job["velocity"]}
        ],
    }
    (directory / "scene.json").write_text(json.dumps(scene, indent=1), encoding="utf-8")


def simulate(directory: Path) -> None:
    """Simulate DIR/job.json and write the frames."""
    job = json.loads((directory / "job.json").read_text(encoding="utf-8"))
    write_scene(directory, job)
    engine = load_engine()
    base = engine.Exec.SimulatorBase()
    scene, log = str(directory / "scene.json"), str(directory / "log")
    base.init(useGui=False, sceneFile=scene, outputDir=log, useCache=False, initialPause=False)
    base.initSimulation()
    fluid = engine.Simulation.getCurrent().getFluidModel(0)
    nodes = fluid.numActiveParticles()
    frames: list[np.ndarray] = []
    steps = 0

    def store_frame() -> None:
        # in the order of particle ids: the engine re-sorts its particles; its buffers are longer than the fluid
        ids, x = (np.array(fluid.getFieldBuffer(name))[:nodes] for name in ("id", "position"))
        frames.append(np.empty((nodes, 3), np.float32))
        frames[-1][ids.ravel()] = x
        (directory / "frames.new").write_text(str(len(frames)), encoding="utf-8")
        os.replace(directory / "frames.new", directory / "frames")  # prepare.py may read it at any time

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps % job["steps"] == 0:
            store_frame()

    store_frame()
    base.setTimeStepCB(after_step)
    base.runSimulation()
    if len(frames) < job["frames"]:
        raise SystemExit(f"SPlisHSPlasH stopped after {len(frames)} of {job['frames']} frames")
    np.save(directory / "position.npy", np.stack(frames[: job["frames"]]))


if __name__ == "__main__":
    try:
        simulate(Path(sys.argv[1]).resolve())
    except OSError as error:
        raise SystemExit(f"{error.filename or sys.argv[1]}: {error.strerror or error}") from None
    # the engine's destructors may crash; all files are written
    os._exit(0)
