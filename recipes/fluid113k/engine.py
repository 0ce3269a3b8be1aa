"""Run one SPlisHSPlasH scene and save its frames: ``python engine.py DIR``.

Reads DIR/job.npz (position (N, 3), velocity and gravity (3,), box (2, 3), radius, dt, frames, leg). Writes
DIR/position.npy and DIR/velocity.npy (frames, N, 3) frame by frame, DIR/mass.npy and DIR/viscosity.npy (N,), the
number of finished frames to DIR/frames, and DIR/whole at the end. A process simulates ``leg`` frames, saves
DIR/state.npz and ends; the next one continues from it. prepare.py starts these processes one after another for each
trajectory, because the engine has global state, a crash in it ends its process, and a killed simulation then loses at
most one leg. Only the initial guess of the pressure solver is lost between legs.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CONFIGURATION = {
    "simulationMethod": 4,  # DFSPH
    "boundaryHandlingMethod": 0,  # walls of particles (Akinci et al. 2012)
    "cflMethod": 1,
    "cflFactor": 1,
    "maxIterations": 100,
    "maxError": 0.01,
    "maxIterationsV": 100,
    "maxErrorV": 0.1,
    "enableDivergenceSolver": True,
}
FLUID = {
    "id": "Fluid",
    "density0": 1000,
    "viscosity": 0.01,
    "viscosityMethod": 2,  # Bender and Koschier 2017; number 3 in the engine version of the original data
    "viscoMaxIter": 200,
    "viscoMaxError": 0.05,
    "surfaceTension": 0.2,
    "surfaceTensionMethod": 0,  # none: the original sets a coefficient and switches the force off
    "maxEmitterParticles": 0,
}
LIBRARIES = "on Debian: apt-get install libgl1 libglu1-mesa libopengl0"


def load_engine() -> Any:
    """The module pysplishsplash, which needs OpenGL libraries even without graphics."""
    try:
        # the wheel's libGLdispatch crashes at import unless the system's library is loaded first
        ctypes.CDLL("libGLdispatch.so.0", mode=ctypes.RTLD_GLOBAL)
        import pysplishsplash
    except (OSError, ImportError) as error:
        raise SystemExit(f"SPlisHSPlasH does not load ({error}); {LIBRARIES}") from None
    return pysplishsplash


def write_scene(directory: Path, job: Mapping[str, np.ndarray], elapsed: float = 0.0, step: float = 0.0) -> None:
    """Write scene.json and the files it names, in the engine's formats.

    elapsed: seconds of earlier legs, which the engine does not count; step: the first time step, if not the longest.
    """
    rows = job["position"]
    header = f"ATTRIBUTES\nposition\nTYPES\nV\nNUMBER_OF_PARTICLES: {len(rows)}\nBEGIN DATA"
    np.savetxt(directory / "fluid.pda", rows, fmt="%.8g", header=header, comments="")
    lines = ["v {:.8g} {:.8g} {:.8g}".format(*corner) for corner in itertools.product(*job["box"].T)]
    for a, b, c, d in ("1243", "5786", "1562", "3487", "1375", "2684"):
        lines += [f"f {a} {b} {c}", f"f {a} {c} {d}"]
    (directory / "box.obj").write_text("\n".join(lines) + "\n", encoding="utf-8")
    dt, frames = float(job["dt"]), int(job["frames"])
    configuration = CONFIGURATION | {
        "particleRadius": float(job["radius"]),
        "gravitation": job["gravity"].tolist(),
        "timeStepSize": step or dt / 4,
        "cflMaxTimeStepSize": dt / 4,  # 5 ms at full size
        "stopAt": (frames - 1) * dt * 1.0001 - elapsed,  # the engine counts in float32
    }
    content = {
        "Configuration": configuration,
        "Materials": [FLUID],
        "RigidBodies": [{"geometryFile": "box.obj", "isDynamic": False, "isWall": True, "samplingMode": 1}],
        "FluidModels": [{"id": FLUID["id"], "particleFile": "fluid.pda", "initialVelocity": job["velocity"].tolist()}],
    }
    (directory / "scene.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def allocated(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A float32 array in a .npy file with allocated disk space; writing to a sparse file could end with SIGBUS."""
    array = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


class Recorder:
    """Callback after each engine step; stores frames at exact multiples of dt.

    The engine's adaptive steps (CFL condition) do not coincide with frame times. Its update is x += h v with the new v, so x
    is exactly linear between steps and is interpolated; v is interpolated too. (Fitting the steps to frame times would make
    tiny steps, and the pressure solver, which divides by h², would then add energy.)
    """

    def __init__(self, fluid: Any, clock: Any, job: Mapping[str, np.ndarray], directory: Path) -> None:
        self.fluid, self.clock, self.directory = fluid, clock, directory
        self.dt, self.total, leg = float(job["dt"]), int(job["frames"]), int(job["leg"])
        self.parent = os.getppid()
        self.nodes = fluid.numActiveParticles()
        names = [directory / f"{name}.npy" for name in ("position", "velocity")]
        self.state_file = directory / "state.npz"
        if self.state_file.exists():
            before = np.load(self.state_file)
            self.elapsed, self.state, self.done = float(before["time"]), before["state"], int(before["done"])
            self.frames = [np.load(name, mmap_mode="r+") for name in names]
            ids = np.array(fluid.getFieldBuffer("id"))[: self.nodes].ravel()
            for name, values in zip(("position", "velocity"), self.state, strict=True):
                np.asarray(fluid.getFieldBuffer(name))[: self.nodes] = values[ids]  # the engine's own memory
        else:
            self.elapsed, self.state, self.done = 0.0, self.read(), 0
            shape = (self.total, self.nodes, 3)  # on disk: half a gigabyte at full size
            self.frames = [allocated(name, shape) for name in names]
            self.store(self.state)
        self.time = self.elapsed
        self.end = min(self.total, (self.done // leg + 1) * leg)

    def read(self) -> np.ndarray:
        """Position and velocity (2, N, 3) in the order of particle ids; the engine re-sorts its particles."""

        def field(name: str) -> np.ndarray:
            # the engine's buffers are longer than the fluid
            return np.array(self.fluid.getFieldBuffer(name))[: self.nodes]

        state = np.empty((2, self.nodes, 3), np.float32)
        state[:, field("id").ravel()] = field("position"), field("velocity")
        return state

    def store(self, state: np.ndarray) -> None:
        """Append a frame: position and velocity (2, N, 3)."""
        for frames, values in zip(self.frames, state, strict=True):
            frames[self.done] = values
        self.done += 1
        count = self.directory / "frames"
        count.with_suffix(".new").write_text(str(self.done), encoding="utf-8")
        os.replace(count.with_suffix(".new"), count)  # prepare.py may read it at any time

    def __call__(self) -> None:
        if os.getppid() != self.parent:  # prepare.py was killed
            os._exit(1)
        time, state = self.elapsed + self.clock.getTime(), self.read()
        while self.done < self.total and self.done * self.dt <= time:
            part = (self.done * self.dt - self.time) / (time - self.time)
            self.store((1 - part) * self.state + part * state)
        self.time, self.state = time, state
        if self.end <= self.done < self.total:
            self.flush()
            fresh = self.state_file.with_suffix(".new.npz")
            np.savez(fresh, time=time, state=state, done=self.done, step=self.clock.getTimeStepSize())
            os.replace(fresh, self.state_file)
            os._exit(0)

    def flush(self) -> None:
        for frames in self.frames:
            frames.flush()


def simulate(directory: Path) -> None:
    """Simulate DIR/job.npz or its next leg and write the frames."""
    job, before = np.load(directory / "job.npz"), directory / "state.npz"
    earlier = [float(np.load(before)[key]) for key in ("time", "step")] if before.exists() else []
    write_scene(directory, job, *earlier)
    engine = load_engine()
    # the engine logs to standard output
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    base = engine.Exec.SimulatorBase()
    base.init(
        useGui=False,
        sceneFile=str(directory / "scene.json"),
        outputDir=str(directory / "log"),
        useCache=False,
        initialPause=False,
    )
    base.initSimulation()
    fluid = engine.Simulation.getCurrent().getFluidModel(0)
    record = Recorder(fluid, engine.TimeManager.getCurrent(), job, directory)
    mass = np.array([fluid.getMass(node) for node in range(record.nodes)], np.float32)
    base.setTimeStepCB(record)
    base.runSimulation()
    if record.done < job["frames"]:
        raise SystemExit(f"SPlisHSPlasH stopped at {record.time:.3f} s, after {record.done} of {job['frames']} frames")
    record.flush()
    np.save(directory / "mass.npy", mass)
    np.save(directory / "viscosity.npy", np.full_like(mass, FLUID["viscosity"]))
    (directory / "whole").touch()


if __name__ == "__main__":
    try:
        simulate(Path(sys.argv[1]).resolve())
    except OSError as error:
        raise SystemExit(f"{error.filename or sys.argv[1]}: {error.strerror or error}") from None
    # the engine's destructors may crash; all files are written
    os._exit(0)
